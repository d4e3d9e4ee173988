"""The commands and the example in docs/targets.md are run, as far as they need no consumer."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pico
import pytest
from command_line import RECIPE, succeed

import hawqkit as hk
from hawqkit.pipeline.folder import RunFolder
from hawqkit.store import write_record
from hawqkit.targets import TARGETS, configuration, find_target
from hawqkit.targets.configuration import MARK, NOTE, SCRIPT

PAGE = (Path(__file__).parents[1] / "docs" / "targets.md").read_text()
SCRIPTS = Path(configuration.__file__).parent / "scripts"
CONFIGURATIONS = [n for n in TARGETS if (SCRIPTS / f"{n.replace('-', '_')}.py").is_file()]
# each configuration target holds at least one of them
FORMATS = ("int4-g64", "int4-g128-asym", "int8-channel", "nf4-g64", "q8_0", "none")


def commands(start: str) -> list[str]:
    """Return the lines of the page's blocks of commands that begin with a word."""
    blocks = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
    return [x for block in blocks for x in block.splitlines() if x.startswith(start)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a pico model in formats of every family."""
    folder = tmp_path_factory.mktemp("targets")
    pico.save(folder / "model", pico.llama(hidden=128, intermediate=128))
    recipe = RECIPE.replace("int3-g32, int4-g32, int8-g32", ", ".join(FORMATS))
    (folder / "quickstart.yaml").write_text(recipe.replace("average_bits: 4.5", "average_bits: 6"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HAWQKIT_CACHE", str(folder / "cache"))
        succeed("probe", "quickstart.yaml")
        succeed("allocate", "runs/quickstart")
    return folder / "runs" / "quickstart"


def choose(run: Path, name: str) -> dict[str, str]:
    """Give each block of the run's allocation a format that a target holds, in turn."""
    target, folder = find_target(name), RunFolder(run)
    table, allocation = folder.read_sensitivities(), folder.read_allocation()
    linear = [x for x in table.layers if x.kind == "linear" and x.name in allocation.layers]
    held = [
        f
        for f in FORMATS
        if f != "none"
        and not target.problems({x.name: f for x in linear}, table.layers, table.model)
    ]
    assert held, name
    choices = [*held, "none"] if target.capabilities().mixed else held[:1]
    mix = dict.fromkeys(allocation.layers, "none")
    mix |= {x.name: choices[(x.block or 0) % len(choices)] for x in linear}
    write_record(folder.allocation, replace(allocation, layers=mix))
    return mix


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_export_of_the_page_gives_the_files_of_the_page(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parents[1])
    mix = choose(run, name)
    (command,) = commands("hawqkit export")
    words = command.split()[1:]
    assert words == ["export", "runs/quickstart", "--target", "auto-round", "-o", "mix"]
    words[3], words[5] = name, f"mix-{name}"
    assert succeed(*words).output == f"written to mix-{name}\n"
    files = {p.name for p in Path(f"mix-{name}").iterdir()}
    assert files > {SCRIPT, MARK, NOTE}
    assert all(f"`{file}`" in PAGE for file in files), files
    note = Path(f"mix-{name}", NOTE).read_text()
    for format_name in set(mix.values()):
        assert f"| `{format_name}` |" in note
    assert f"\n## {name}\n" in PAGE


def test_every_script_takes_the_options_that_the_page_gives_it() -> None:
    asked: dict[str, set[str]] = {}
    for name in CONFIGURATIONS:
        section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        lines = re.findall(r"^python mix/apply.py (.*)$", section, re.MULTILINE)
        asked[name] = {word for line in lines for word in line.split() if word.startswith("--")}
        asked[name] |= set(re.findall(r"`(--[a-z-]+)[` ]", section)) & {"--iters", "--data"}
    assert asked["auto-round"] == {"--iters", "--data"}
    assert asked["gptqmodel"] == {"--data"}
    for name, options in asked.items():
        done = subprocess.run(
            [sys.executable, "-I", str(SCRIPTS / f"{name.replace('-', '_')}.py"), "--help"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert all(option in done.stdout for option in options), name


def test_the_example_of_gguf_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code.count("80e6") == 1
    monkeypatch.chdir(tmp_path)
    pico.save(tmp_path / "model", pico.llama(hidden=256, intermediate=256))
    model = hk.load_model("model")
    names: dict[str, object] = {
        "hk": hk,
        "batches": hk.load_batches("builtin", model, sequences=4, length=32),
    }
    # the pico model's tokenizer is none that llama.cpp knows; without one a file takes numbers
    code = code.replace('hk.load_model("PATH/TO/MODEL")', "plain")
    names["plain"] = replace(model, tokenizer=None)
    exec(compile(code.replace("80e6", "3e6"), "docs/targets.md", "exec"), names)
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert 0 < size <= 3e6


def test_the_page_says_of_every_consumer_how_its_environment_is_made() -> None:
    for path in (Path(__file__).parent / "consumers").glob("*.txt"):
        section = PAGE.partition("## Versions tested")[2]
        assert f"`{path.stem}`" in section or path.stem in section, path
    for name in TARGETS:
        if name != "bits":
            assert f"`{name}`" in PAGE, name
