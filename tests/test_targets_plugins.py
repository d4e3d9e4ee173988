"""Targets of other packages: found, checked, listed, and harmless where they are broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import RECIPE, invoke, succeed

from hawqkit.errors import InputError, RecipeError
from hawqkit.recipe import load_recipe
from hawqkit.targets import TARGETS, Target, conformance, find_target, plugins, target_names

SOUND = """\
from __future__ import annotations

import json

from hawqkit.errors import Unsupported
from hawqkit.targets.configuration import marked, problems_of, write_configuration, mark_text
from hawqkit.targets.contract import Capabilities, IntegerFormats, require

NAME = "acme"
ABOUT = "a list for Acme"
RUNTIMES = ("acme-serve",)
SIZED = False


def capabilities():
    return Capabilities((IntegerFormats((4, 8)),))


def problems(mix, layers, facts):
    return problems_of(mix, layers, facts, capabilities())


def size_table(layers, formats, facts):
    raise Unsupported("no size")


def size(mix, layers, facts):
    raise Unsupported("no size")


def write(allocation, folder, model):
    return write_from_facts(allocation, folder, model.layers, model.facts)


def write_from_facts(allocation, folder, layers, facts):
    require(NAME, problems(allocation.layers, layers, facts))
    files = {"acme.json": json.dumps(dict(allocation.layers)),
             "hawqkit.json": mark_text(NAME, allocation, layers, facts)}
    return write_configuration(folder, files, marked(NAME))
"""


def install(
    folder: Path, package: str, entries: str, modules: dict[str, str], *, version: str = "1.0"
) -> None:
    """Write what an installed package consists of: modules, and a folder of metadata."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    metadata = folder / f"{package}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    )
    (metadata / "entry_points.txt").write_text(entries)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of installed packages; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    plugins._search.cache_clear()
    return folder


@pytest.fixture
def acme(site: Path) -> Target:
    install(site, "acme-tools", "[hawqkit.targets]\nacme = acme_target\n", {"acme_target": SOUND})
    return find_target("acme")


def recipe(folder: Path, **changes: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(RECIPE), **changes}))
    return path


def test_a_target_of_another_package_is_found_listed_and_taken_in_recipes(
    acme: Target, tmp_path: Path
) -> None:
    assert target_names() == (*TARGETS, "acme")
    listed = succeed("targets").output
    assert "acme: a list for Acme\n  read by acme-serve; has no size to limit\n" in listed
    assert load_recipe(recipe(tmp_path, export=["acme", "bits"])).export == ("acme", "bits")
    with pytest.raises(RecipeError, match="Did you mean 'acme'"):
        load_recipe(recipe(tmp_path, export=["acmee"]))
    with pytest.raises(RecipeError, match="target of which a size is known"):
        load_recipe(recipe(tmp_path, size_target="acme"))
    with pytest.raises(InputError, match="acme, "):
        find_target("nothing-like-it")


@pytest.mark.parametrize("check", range(7))
def test_a_target_of_another_package_passes_the_conformance_suite(
    acme: Target, check: int, tmp_path: Path
) -> None:
    checks = conformance.checks_of(acme)
    assert len(checks) == 7
    (tmp_path / "empty").mkdir()
    checks[check](acme, tmp_path / "empty")


CARELESS = """
    folder.mkdir(exist_ok=True, parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]"""
NAMED_AFTER_LAYERS = (
    """
    files |= {name.replace("/", "_"): "" for name in allocation.layers}"""
    + CARELESS
)
WRITES = "\n    return write_configuration(folder, files, marked(NAME))"


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("    require(NAME, problems(allocation.layers, layers, facts))\n", "",
         "refuses_what_is_no_layer"),
        ("IntegerFormats((4, 8))", "IntegerFormats(())", "has_the_names"),
        ("return problems_of(mix, layers, facts, capabilities())", "return []",
         "refuses_what_it_does_not"),
        (WRITES, CARELESS, "leaves_nothing"),
        ("marked(NAME))", "lambda folder: True)", "replaces_its_own"),
        ('raise Unsupported("no size")', "return 0", "has_no_size"),
        (WRITES, NAMED_AFTER_LAYERS, "quotes"),
    ],
)  # fmt: skip
def test_the_conformance_suite_sees_what_is_wrong(
    old: str, new: str, check: str, site: Path, tmp_path: Path
) -> None:
    assert old in SOUND
    entry = "[hawqkit.targets]\nacme = acme_target\n"
    install(site, "acme-tools", entry, {"acme_target": SOUND.replace(old, new)})
    target = find_target("acme")
    (tmp_path / "empty").mkdir()
    chosen = [c for c in conformance.checks_of(target) if c.__name__.startswith(check)]
    # OSError: the careless writer of the last case meets a folder
    with pytest.raises((AssertionError, InputError, OSError)):
        chosen[0](target, tmp_path / "empty")


BROKEN = {
    "import": ("acme = acme_target", "import no_such_library", "ModuleNotFoundError"),
    "end": ("acme = acme_target", "raise SystemExit(3)", "SystemExit"),
    "syntax": ("acme = acme_target", "def (", "SyntaxError"),
    "value": ("acme = :::", SOUND, "acme-tools 1.0 cannot be imported"),
    "empty": ("acme = acme_target", "NAME = 'acme'", "there is no function 'write'"),
    "name": ("acme = acme_target", SOUND.replace('"acme"', '"other"'), "NAME is 'other'"),
    "raises": ("acme = acme_target", SOUND.replace("return Capabilities", "return 1 / 0, Cap"),
               "ZeroDivisionError"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_told_of_where_it_is_asked_for_and_nowhere_else(
    case: str, site: Path, tmp_path: Path
) -> None:
    entry, module, said = BROKEN[case]
    install(site, "acme-tools", f"[hawqkit.targets]\n{entry}\n", {"acme_target": module})
    with pytest.raises(InputError, match=r"target 'acme' of package acme-tools 1\.0") as caught:
        find_target("acme")
    assert said in str(caught.value)
    with pytest.raises(RecipeError, match=r"acme-tools 1\.0") as refused:
        load_recipe(recipe(tmp_path, export=["acme"]))
    assert said in str(refused.value)
    done = invoke("targets")
    assert done.exit_code == 0
    assert said in done.stderr
    assert "bits: " in done.stdout
    assert find_target("bits").NAME == "bits"
    assert load_recipe(recipe(tmp_path)).export == ("bits",)


def test_clashing_names_are_told_of_and_the_built_in_target_stays(
    site: Path, tmp_path: Path
) -> None:
    install(site, "one", "[hawqkit.targets]\nacme = acme_target\nbits = acme_target\n", {})
    install(site, "two", "[hawqkit.targets]\nacme = acme_target\na/b = acme_target\n", {})
    install(site, "three", "[hawqkit.targets]\nno equals sign\n", {})
    install(site, "unrelated", "[console_scripts]\nno equals sign\n", {})
    assert find_target("bits").__name__ == "hawqkit.targets.bits"
    assert target_names() == tuple(TARGETS)
    with pytest.raises(InputError, match=r"announced more than once, by .*(one 1.0|two 1.0) and"):
        find_target("acme")
    with pytest.raises(RecipeError, match="uninstall all of them but one"):
        load_recipe(recipe(tmp_path, export=["acme"]))
    done = invoke("targets")
    assert done.exit_code == 0
    warnings = done.stderr
    assert warnings.count("warning: ") == 4
    for words in ("'bits' of package one 1.0", "'a/b' of package two 1.0", "package three 1.0",
                  "'acme' is announced"):  # fmt: skip
        assert words in warnings
    assert "unrelated" not in warnings


def test_nothing_is_searched_or_imported_for_a_built_in_name(site: Path) -> None:
    install(site, "acme-tools", "[hawqkit.targets]\nacme = acme_target\n", {"acme_target": SOUND})
    code = (
        f"import sys, json; sys.path.insert(0, {str(site)!r});"
        "import hawqkit.recipe; from hawqkit.targets import find_target, TARGETS;"
        "[find_target(name) for name in TARGETS];"
        "from hawqkit.targets import plugins;"
        "before = plugins._search.cache_info().misses; known = 'acme_target' in sys.modules;"
        "find_target('acme');"
        "print(json.dumps([before, known, 'acme_target' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0, False, True]
