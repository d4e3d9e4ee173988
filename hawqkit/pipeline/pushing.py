"""Give an export to a model hub, with a model card; or lay out in a folder what would be given."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from hawqkit.errors import HawqkitError, InputError
from hawqkit.pipeline.folder import RunFolder
from hawqkit.report.model_card import model_card, published_recipe
from hawqkit.targets.folders import published

REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
CARD, RECIPE, ALLOCATION = "README.md", "hawqkit/recipe.yaml", "hawqkit/allocation.json"
Contents = dict[str, bytes | Path]


def contents_of(folder: str | Path, export: str | Path, target: str, repository: str) -> Contents:
    """Return what is pushed: name in the repository -> bytes or file.

    These are the files of the export, the model card in place of the export's README, the recipe
    without folders of this machine, and the allocation.

    Args:
        folder: of the run.
        export: folder that `export_run` wrote.
        target: who reads it.
        repository: `USER/NAME`, the card's title.
    """
    run, root = RunFolder(Path(folder)), Path(export)
    allocation, recipe = run.read_allocation(), published_recipe(run.recipe.read_text("utf-8"))
    files: Contents = {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    card = model_card(
        allocation,
        run.read_sensitivities(),
        run.read_validation(),
        repository=repository,
        target=target,
        loading=_loading(root / CARD, target),
        recipe=recipe,
    )
    own: Contents = {
        CARD: card.encode(),
        RECIPE: recipe.encode(),
        ALLOCATION: run.allocation.read_bytes(),
    }
    return files | own


def push(contents: Contents, repository: str, *, private: bool = True) -> str:
    """Make the repository if it is not there, put everything into one commit, return its address.

    The token is the one of `hf auth login` or of the variable HF_TOKEN.

    Raises:
        InputError: the name is none of a repository, or the hub refuses the token.
        HawqkitError: the hub cannot be reached, or refuses; nothing was committed.
    """
    if not REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r} is no name of a repository: write USER/NAME.")
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    from hawqkit.models.sources import transport_error

    if constants.is_offline_mode():
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it.")
    api = HfApi()
    operations = [
        CommitOperationAdd(name, str(data) if isinstance(data, Path) else data)
        for name, data in contents.items()
    ]
    try:
        api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        done = api.create_commit(repository, operations, commit_message="Quantized by hawqkit")
    except LocalTokenNotFoundError as error:
        raise InputError("no token: run `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise InputError(
                f"{repository}: the hub refuses the token ({status}); it must be allowed to write "
                "there: `hf auth login`, or HF_TOKEN."
            ) from error
        raise HawqkitError(f"{repository}: the hub answered {status}: {error}") from error
    except (OSError, transport_error()) as error:
        raise HawqkitError(
            f"{repository}: the hub cannot be reached, and nothing was committed: {error}"
        ) from error
    return str(done.commit_url or f"{api.endpoint}/{repository}")


def stage(contents: Contents, folder: str | Path) -> list[Path]:
    """Lay out in a folder exactly what `push` would commit.

    Raises:
        InputError: the folder holds something else.
    """
    root = Path(folder)
    with published(root, lambda old: (old / ALLOCATION).is_file()) as place:
        for name, data in contents.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, Path):
                shutil.copyfile(data, path)
            else:
                path.write_bytes(data)
    return [root / name for name in contents]


def _loading(readme: Path, target: str) -> str:
    """Return the part of an export's README that says how to load it."""
    text = readme.read_text("utf-8") if readme.is_file() else ""
    start = re.search(r"^## (Load|Run|Use|Apply)[^\n]*\n", text, re.MULTILINE)
    if start is None:
        return f"The files are those of hawqkit's target `{target}`."
    return text[start.end() :].strip()
