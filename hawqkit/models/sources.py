"""From what a user calls a model to files on this disk: hub id, folder, GGUF file, package file."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hawqkit.errors import HawqkitError, InputError, Unsupported, did_you_mean

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
CONNECT_SECONDS = 3.0  # a machine with a network answers well within; the hub client waits 27 s
INDEX = "model.safetensors.index.json"


def find_source(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Path:
    """Return the checkpoint folder or GGUF file that a source stands for.

    Args:
        source: a folder, a `.gguf` file, `package:NAME/FILE`, or a hub id.
        revision: branch, tag or commit; for hub ids only.
        trust_remote_code: whether Python files of a hub repository are downloaded too.

    Raises:
        InputError: nothing is there, or what is there cannot be loaded safely.
        HawqkitError: the hub cannot be reached.
    """
    if not isinstance(source, str) or not source.strip():
        raise InputError(f"model.source: got {source!r}; give a hub id, a folder or a GGUF file.")
    if source.startswith("package:"):
        path = _in_package(source)
    elif (local := _local(source)) is not None:
        path = local
    else:
        return checked_folder(_from_hub(source, revision, trust_remote_code), source)
    if revision is not None:
        raise InputError(
            f"model.revision: got {revision!r}, but {source} lies on this disk and has no "
            "revisions; leave it out."
        )
    return checked_folder(path, source) if path.is_dir() else _checked_file(path, source)


def checked_folder(folder: Path, source: str) -> Path:
    """Return a folder that holds a safetensors checkpoint.

    Raises:
        InputError: there is no configuration, or no safetensors weights; for a pickle checkpoint
            the message says why it is refused.
    """
    names = sorted(p.name for p in folder.iterdir())
    if "config.json" not in names:
        gguf = [n for n in names if n.endswith(".gguf")]
        hint = (
            f" It holds GGUF files: name one of them, such as {folder / gguf[0]}." if gguf else ""
        )
        raise InputError(
            f"{source}: the folder has no config.json, so it is no checkpoint that transformers "
            f"could load; it holds {', '.join(names[:6]) or 'nothing'}.{hint}"
        )
    if any(n.endswith(".safetensors") for n in names):
        _check_shards(folder, source)
        return folder
    pickles = [n for n in names if n.endswith(_PICKLES)]
    if pickles:
        raise InputError(
            f"{source}: {pickles[0]} is a pickle checkpoint, refused because loading a pickle can "
            "execute any code that its author put there. If you trust it, convert it once: "
            "AutoModelForCausalLM.from_pretrained(SOURCE, use_safetensors=False)"
            ".save_pretrained(NEW_FOLDER) writes safetensors (for classifiers the Auto class of "
            "their task does); then name the new folder."
        )
    raise InputError(f"{source}: the folder has a config.json but no *.safetensors weights.")


def _check_shards(folder: Path, source: str) -> None:
    index = folder / INDEX
    if not index.exists():
        return
    missing = [n for n in _shards(index) if not (folder / n).exists()]
    if missing:
        raise InputError(
            f"{source}: {INDEX} names {', '.join(missing[:4])}, which the folder does not hold; "
            "copy or download the checkpoint again."
        )


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index.name} is damaged ({error}); get the checkpoint again.") from None


def _local(source: str) -> Path | None:
    """Return the path that a source means, None if it can only be a hub id."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if _HUB_ID.fullmatch(source) and not source.endswith((".gguf", ".safetensors")):
        return None
    parent = path.parent
    near = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    where = "" if parent.is_dir() else f"; {parent} does not exist either"
    raise InputError(
        f"{source}: there is no such file or folder{where}. Give an existing path, a hub id "
        "(OWNER/NAME) or package:NAME/FILE." + did_you_mean(path.name, near)
    )


def _checked_file(path: Path, source: str) -> Path:
    if path.suffix == ".gguf":
        return path
    what = (
        "a pickle, which can execute any code when it is loaded"
        if path.suffix in _PICKLES
        else "a single file that is not GGUF"
    )
    raise InputError(f"{source}: this is {what}; give the checkpoint's folder, or a .gguf file.")


def _in_package(source: str) -> Path:
    """Return a file inside an installed package, which is never imported."""
    name, _, inside = source.removeprefix("package:").partition("/")
    if not name or not inside:
        raise InputError(f"{source}: write package:NAME/FILE, the file's path inside the package.")
    try:
        # A dotted name would make find_spec import the parent package.
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    roots = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    if not roots:
        raise InputError(
            f"{source}: there is no installed package {name!r} (NAME is the import name); install "
            "it into this environment first."
        )
    for root in roots:
        path = root / inside
        if path.exists() and path.resolve().is_relative_to(root.resolve()):
            return path
    files = [
        p.relative_to(root).as_posix()
        for root in roots
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.suffix in {".gguf", ".safetensors"}
    ]
    raise InputError(
        f"{source}: package {name!r} holds no {inside!r}; model files in it: "
        f"{', '.join(files[:8]) or 'none'}." + did_you_mean(inside, files)
    )


def _from_hub(source: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Return the snapshot's folder: from the local cache if it is complete, else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_FILES, "*.py"] if trust_remote_code else list(_FILES)
    options: dict[str, Any] = {"revision": revision, "allow_patterns": patterns}
    try:
        cached = Path(snapshot_download(source, local_files_only=True, **options))
        if _complete(cached):
            return cached
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    endpoint = hub_endpoint()
    _require_network(source, endpoint)
    try:
        return Path(snapshot_download(source, endpoint=endpoint, **options))
    except HfHubHTTPError as error:
        raise _refused(source, revision, error) from None
    except (OSError, transport_error()) as error:
        raise HawqkitError(f"{source}: the download failed ({first_line(error)}).") from None


def transport_error() -> type[Exception]:
    """Return what the hub client raises when a connection breaks: no OSError.

    It is its HTTP library's own error, and that library is httpx or httpx2, depending on the
    client's version, so it is not named here.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _complete(folder: Path) -> bool:
    if not (folder / "config.json").exists():
        return False
    index = folder / INDEX
    if index.exists():
        return all((folder / n).exists() for n in _shards(index))
    return any(folder.glob("*.safetensors"))


def hub_endpoint() -> str:
    """Return the hub's address: `$HF_ENDPOINT`, else the client's own."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or str(constants.ENDPOINT)


def _require_network(source: str, endpoint: str) -> None:
    """Fail within seconds where the hub client itself would try for half a minute."""
    from huggingface_hub import constants

    advice = (
        "connect to a network, or name a local folder, a GGUF file or package:NAME/FILE instead"
    )
    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if asked or constants.HF_HUB_OFFLINE:
        raise HawqkitError(
            f"{source} is no folder here and not in the local hub cache, and HF_HUB_OFFLINE "
            f"forbids to download it: {advice}."
        )
    if not reachable(endpoint):
        raise HawqkitError(
            f"{source} is no folder here and not in the local hub cache, and {endpoint} cannot be "
            f"reached: {advice}."
        )


def reachable(endpoint: str, seconds: float = CONNECT_SECONDS) -> bool:
    """Whether a connection to a URL's host, or to the proxy in its way, opens within `seconds`."""
    url = urlsplit(endpoint)
    proxy = os.environ.get(f"{url.scheme}_proxy") or os.environ.get(f"{url.scheme}_proxy".upper())
    if proxy:
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = url.port or (80 if url.scheme == "http" else 443)
    answered = threading.Event()

    def connect() -> None:
        try:
            with socket.create_connection((url.hostname or "", port), timeout=seconds):
                answered.set()
        except OSError:
            return

    # Name look-up has no time limit of its own, so it runs beside us and is left behind.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _refused(source: str, revision: str | None, error: Exception) -> HawqkitError:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return Unsupported(
            f"{source}: its owner asks you to accept terms first; do so on the model's page, then "
            "log in with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{source}: the hub has no revision {revision!r} of it.")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"{source}: neither a folder here nor a model on the hub (or it is private and you are "
            "not logged in)."
        )
    return HawqkitError(f"{source}: the hub answered with an error ({first_line(error)}).")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
