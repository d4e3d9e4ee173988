from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hawqkit import __version__
from hawqkit.cli import COMMANDS, cli
from hawqkit.formats import format_names
from hawqkit.recipe import schema_text
from hawqkit.targets import TARGETS, find_target

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "accelerate", "datasets"}
VERBS = [
    "run",
    "check",
    "probe",
    "spectrum",
    "allocate",
    "latency",
    "tune",
    "validate",
    "export",
    "import",
    "report",
    "show",
    "formats",
    "targets",
    "recipes",
]  # the documented ones


def modules_after(*arguments: str) -> set[str]:
    """Return the modules that a fresh interpreter holds after a command line."""
    program = (
        "import json, sys\nfrom hawqkit.cli import cli\n"
        f"cli({list(arguments)!r}, standalone_mode=False)\n"
        "print()\nprint(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_is_instant_and_imports_neither_torch_nor_numpy() -> None:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "hawqkit", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - begin)
    assert (
        min(seconds) < 1.0
    )  # 0.1 s on an idle machine, 0.4 s are promised; test machines are busy
    loaded = modules_after("--help")
    assert "click" in loaded
    assert not loaded & {*HEAVY, "numpy", "pydantic", "rich"}


@pytest.mark.parametrize("arguments", [["formats"], ["targets"], ["recipes"], ["recipes", "llama"]])
def test_what_lists_imports_no_torch(arguments: list[str]) -> None:
    assert not modules_after(*arguments) & HEAVY


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_command_imports_no_torch_and_says_what_its_line_says(verb: str) -> None:
    done = CliRunner().invoke(cli, [verb, "--help"])
    assert done.exit_code == 0
    assert f"Usage: cli {verb}" in done.output
    assert not modules_after(verb, "--help") & HEAVY


def test_help_lists_every_command_with_its_line() -> None:
    output = CliRunner().invoke(cli, ["--help"]).output
    assert list(COMMANDS) == VERBS
    for name, (_, about) in COMMANDS.items():
        assert any(line.split() == [name, *about.split()] for line in output.splitlines())


def test_every_command_of_the_table_exists_under_its_name() -> None:
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert isinstance(command, click.Command)
        assert command.name == name


def test_version() -> None:
    assert (
        CliRunner().invoke(cli, ["--version"]).output.strip() == f"hawqkit, version {__version__}"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chek"], "Did you mean 'check'?"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "minimal", "--sett", "a=b"], "--set"),
        (["show", "no-such-folder"], "does not exist"),
        (["allocate", ".", "--risk", "-1"], "x>=0"),
        (["export", "."], "--target"),
    ],
)
def test_wrong_usage_ends_with_two(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stdout == ""


def test_formats_lists_each_with_the_bits_that_it_takes() -> None:
    rows = [r.split() for r in CliRunner().invoke(cli, ["formats"]).output.splitlines()]
    taken = {row[0]: row[-1] for row in rows if row and row[0] in format_names()}
    assert list(taken) == list(format_names())
    assert taken["int4-g64"] == "4.2500"  # 4 + 16 / 64
    assert taken["int4-g64-asym"] == "4.3125"  # and a zero point of 4 bits
    assert taken["int8-channel"] == "8.0039"  # 8 + 16 / 4096
    assert taken["none"] == "16.0000"


def test_targets_lists_what_each_holds() -> None:
    output = CliRunner().invoke(cli, ["targets"]).output
    parts = {}
    for name in TARGETS:
        assert f"{name}: {find_target(name).ABOUT}" in output
        parts[name] = output.partition(f"{name}: ")[2]
    own = parts["compressed-tensors"].partition("bits: ")[0]
    assert "int2 int3 int4 int5 int6 int8: g32 g64 g128 channel\n" in own
    assert "asym" not in own
    assert "g64-asym" in parts["bits"]


def test_recipes_lists_prints_and_knows_the_schema() -> None:
    runner = CliRunner()
    output = runner.invoke(cli, ["recipes"]).output
    assert "quickstart-small  The quickstart made small" in output
    printed = runner.invoke(cli, ["recipes", "minimal"]).output
    assert printed == (ROOT / "recipes" / "minimal.yaml").read_text()
    assert runner.invoke(cli, ["recipes", "--schema"]).output == schema_text()
    unknown = runner.invoke(cli, ["recipes", "quikstart"])
    assert unknown.exit_code == 2
    assert "Did you mean 'quickstart'?" in unknown.stderr
