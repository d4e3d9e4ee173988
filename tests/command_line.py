"""The command line inside this process: run it, and hold what every refusal must be."""

from __future__ import annotations

import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hawqkit.cli import cli

SCREEN = 24  # lines of the smallest terminal that is still in use

RECIPE = """\
model: {source: model}
calibration: {sequences: 4, length: 32, withheld: 2}
held_out: {sequences: 2, length: 32}
layers: {exclude: [lm_head, model.embed_tokens]}
formats: [int3-g32, int4-g32, int8-g32]
budget: {average_bits: 4.5}
export: [bits]
validate: {baselines: [uniform]}
stability: {draws: 2}
"""


def sets(*assignments: str) -> list[str]:
    """Return each assignment behind a `--set` of its own."""
    return [part for assignment in assignments for part in ("--set", assignment)]


def invoke(*arguments: str) -> Result:
    """Run the command line; an error that it does not put into words is raised here."""
    done = CliRunner().invoke(cli, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def succeed(*arguments: str) -> Result:
    """Run the command line, which must end well."""
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return done


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder; the lock is no content and may be left behind."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def folders(folder: Path) -> list[Path]:
    """Return every folder below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_dir())


def refuse(here: Path, *arguments: str, words: str, code: int = 2) -> str:
    """Run the command line in `here`, hold that it refuses as the issue asks, return its message.

    That is: the exit code, an error of at most one screen that has these words, no file or folder
    made or changed.
    """
    before, places = contents(here), folders(here)
    done = invoke(*arguments)
    assert done.exit_code == code, done.output
    message = done.stderr
    assert message.startswith("error: ")
    assert words in message, message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= SCREEN
    assert contents(here) == before
    assert folders(here) == places
    return str(message)


def make_run(folder: Path, *arguments: str) -> Path:
    """Write the recipe and run it in `folder`, into `folder/run`."""
    (folder / "r.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        succeed("run", "r.yaml", "-o", "run", *arguments)
    return folder / "run"


def run_silently(folder: str, *arguments: str) -> None:
    """Run the command line in a folder: what a process of its own is given to do."""
    os.chdir(folder)
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        cli(arguments)
