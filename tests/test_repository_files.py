from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("hawqkit", "tests", "examples", "benchmarks")
TEXT = {".py", ".md", ".toml", ".yaml", ".txt", ".j2", ".json", ""}

# Paths of the machine that something was written on have no meaning on another one. Each is put
# together here, so that this file does not hold what it looks for.
LOCAL_PATHS = ["/" + name for name in ("work/", "root/", "home/", "Users/", "tmp/", "opt/pypi")]


def python_files() -> list[Path]:
    """Return every Python file of the code; environments of benchmarks are not ours."""
    found = (file for folder in CODE for file in (ROOT / folder).rglob("*.py"))
    return sorted(file for file in found if ".venv" not in file.parts)


def own_text() -> list[Path]:
    """Return every text file that git would take along, whether it is committed yet or not."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout.split("\0")
    files = [ROOT / name for name in listed if name]
    return [file for file in files if file.suffix in TEXT and file.is_file()]


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_files_stay_within_400_lines() -> None:
    files = python_files()
    assert len(files) > 50
    assert [f"{f}: {n}" for f in files if (n := len(f.read_text().splitlines())) > 400] == []


def test_functions_of_the_library_stay_within_60_lines() -> None:
    long = []
    for file in (ROOT / "hawqkit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                first = node.body[0]
                # The docstring of a public function holds formulas and shapes; the code counts.
                begin = first.end_lineno if ast.get_docstring(node) else node.lineno
                if node.end_lineno - (begin or node.lineno) > 60:
                    long.append(f"{file}:{node.lineno} {node.name}")
    assert long == []


def test_no_room_is_a_drawer() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [file for file in python_files() if file.name in drawers] == []


@pytest.mark.parametrize("path", LOCAL_PATHS)
def test_no_file_names_a_path_of_one_machine(path: str) -> None:
    files = own_text()
    assert ROOT / "pyproject.toml" in files
    found = re.compile(r"(?<![\w.~/-])" + re.escape(path))
    assert [str(f) for f in files if found.search(f.read_text(errors="replace"))] == []


def test_recipes_are_part_of_the_wheel() -> None:
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    wheel = hatch["build"]["targets"]["wheel"]
    assert "recipes" in wheel["only-include"]
    assert wheel["sources"] == {"recipes": "hawqkit/_recipes"}
    assert list((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_command_in_a_document_exists(document: str) -> None:
    named = set(re.findall(r"`make ([a-z][a-z-]*)", (ROOT / document).read_text()))
    named |= set(
        re.findall(r"^\s*make ([a-z][a-z-]*)", (ROOT / document).read_text(), re.MULTILINE)
    )
    assert "test" in named
    assert named <= makefile_targets()


def test_make_help_lists_every_command() -> None:
    shown = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True
    ).stdout
    assert makefile_targets() - {"help"} <= set(re.findall(r"make ([a-z-]+)", shown))


def test_every_dependency_is_pinned_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        asked += [entry for entry in extra if not entry.startswith("hawqkit[")]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    names = {re.split(r"[><=]", entry)[0].lower().replace("_", "-") for entry in asked}
    assert "torch" in names
    assert names <= pinned


def test_every_lower_bound_admits_the_tested_version() -> None:
    from packaging.requirements import Requirement

    pinned = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for entry in project["dependencies"]:
        requirement = Requirement(entry)
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(pinned[name]), entry
