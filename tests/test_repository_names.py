from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import hawqkit

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "transformers", "accelerate", "datasets", "scipy", "pydantic", "click")
WITH_TORCH = ("torch", "transformers", "accelerate", "datasets")


def modules_after(code: str) -> set[str]:
    """Return the modules that a fresh interpreter holds after `code`."""
    program = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_hawqkit_imports_nothing_heavy() -> None:
    loaded = modules_after("import hawqkit; dir(hawqkit)")
    assert "hawqkit" in loaded
    assert not loaded.intersection(HEAVY)


@pytest.mark.parametrize(
    "code",
    [
        "import hawqkit.allocation.exact, hawqkit.allocation.frontier",
        "import hawqkit.store, hawqkit.journal, hawqkit.records, hawqkit.formats",
        "import hawqkit; hawqkit.allocate, hawqkit.export, hawqkit.Sensitivities",
        "import hawqkit.recipe; hawqkit.recipe.load_recipe",
        "import hawqkit; hawqkit.write_report",
        "import hawqkit.targets as t; [t.find_target(name) for name in t.TARGETS]",
        "import hawqkit.cli",
        "import hawqkit.sensitivity.scores",
    ],
)
def test_what_needs_no_torch_does_not_import_it(code: str) -> None:
    assert not modules_after(code).intersection(WITH_TORCH)


def test_every_public_name_resolves_to_what_its_module_defines() -> None:
    for name in hawqkit.__all__:
        value = getattr(hawqkit, name)
        assert not isinstance(value, ModuleType), name
        if name != "__version__":
            assert value.__name__ == name
            assert value.__module__.startswith(hawqkit._HOMES[name])


def test_all_dir_and_table_list_the_same_names() -> None:
    assert sorted(hawqkit.__all__) == sorted([*hawqkit._HOMES, "__version__"])
    assert set(hawqkit.__all__) <= set(dir(hawqkit))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'loadmodel'"):
        _ = hawqkit.loadmodel


def test_no_public_name_is_that_of_a_room() -> None:
    rooms = {path.stem for path in (ROOT / "hawqkit").iterdir()}
    assert "allocation" in rooms
    assert not rooms & set(hawqkit._HOMES)


def test_the_typed_marker_lies_beside_the_package() -> None:
    assert (Path(hawqkit.__file__).parent / "py.typed").is_file()


def test_the_installed_version_is_that_of_the_code() -> None:
    assert version("hawqkit") == hawqkit.__version__


def test_the_changelog_has_a_section_for_the_version() -> None:
    assert f"## [{hawqkit.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_extra_that_make_installs_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"quickstart", "test", "dev"} <= set(project["optional-dependencies"])
