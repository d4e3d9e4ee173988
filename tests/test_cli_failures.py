from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hawqkit import errors, pipeline
from hawqkit.cli import cli
from hawqkit.cli.failures import explain_failure

SOUND = "model: {source: nowhere}\nformats: [int4-g64]\nbudget: {average_bits: 4.5}\n"

# Each is a whole file: what the issue lists as bad input in a recipe, where no model is needed.
BAD = {
    "not YAML": "model: {source: x\nformats: [int4-g64]\n",
    "not a mapping": "- model\n",
    "empty": "",
    "wrong types": SOUND + "calibration: {sequences: many, length: [1]}\nlayers: 3\n",
    "unknown key": SOUND + "speling: 1\n",
    "unknown format": SOUND.replace("int4-g64", "int4-g65"),
    "unknown score": SOUND + "sensitivity: {score: hessian}\n",
    "unknown target": SOUND + "export: [awq]\n",
    "unknown runtime": SOUND + "runtime: tgi\n",
    "empty format list": SOUND.replace("int4-g64", ""),
    "impossible budget": SOUND.replace("4.5", "3.5"),
    "contradictory budgets": SOUND.replace("4.5}", "4.5, average_bits: 5.0}"),
    "fifty problems": SOUND + "".join(f"key{i}: 1\n" for i in range(50)),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make every run end in an error."""

    def raises(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", raises, raising=False)


@pytest.mark.parametrize("verb", ["run", "check", "probe"])
@pytest.mark.parametrize("what", BAD)
def test_a_bad_recipe_ends_with_two_on_one_screen_and_writes_nothing(
    here: Path, verb: str, what: str
) -> None:
    (here / "r.yaml").write_text(BAD[what])
    done = CliRunner().invoke(cli, [verb, "r.yaml"])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: r.yaml: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 24
    assert sorted(p.name for p in here.iterdir()) == ["r.yaml"]


def test_a_bad_recipe_is_told_before_torch_is_imported(here: Path) -> None:
    (here / "r.yaml").write_text(BAD["unknown score"])
    code = (
        "import sys\nfrom hawqkit.cli import cli\n"
        "try: cli(['run', 'r.yaml'])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


def test_problems_beyond_one_screen_are_counted(here: Path) -> None:
    (here / "r.yaml").write_text(BAD["fifty problems"])
    lines = CliRunner().invoke(cli, ["run", "r.yaml"]).stderr.splitlines()
    assert lines[0] == "error: r.yaml: 50 problems"
    shown = [line for line in lines if line.startswith("  - ")]
    assert lines[-1] == f"  and {50 - len(shown)} more."


def test_a_bad_override_ends_with_two(here: Path) -> None:
    (here / "r.yaml").write_text(SOUND)
    done = CliRunner().invoke(cli, ["run", "r.yaml", "--set", "budget.average_bits=2"])
    assert done.exit_code == 2
    assert "budget.average_bits (--set): 2 cannot be had" in done.stderr


def test_a_missing_recipe_and_model_end_with_two_and_write_nothing(here: Path) -> None:
    done = CliRunner().invoke(cli, ["run", "none.yaml"])
    assert (done.exit_code, "no such file" in done.stderr) == (2, True)
    (here / "r.yaml").write_text(SOUND.replace("nowhere", "./nowhere"))
    done = CliRunner().invoke(cli, ["run", "r.yaml"])
    assert done.exit_code == 2
    assert "nowhere" in done.stderr
    assert sorted(p.name for p in here.iterdir()) == ["r.yaml"]


@pytest.mark.parametrize("verb", ["allocate", "validate", "report", "show"])
def test_a_folder_that_is_no_run_ends_with_two_and_stays_empty(here: Path, verb: str) -> None:
    (here / "empty").mkdir()
    done = CliRunner().invoke(cli, [verb, "empty"])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert list((here / "empty").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.HawqkitError("no network"), 1, "error: no network"),
        (errors.BudgetError("too small"), 2, "error: too small"),
        (errors.StateMismatch("other model"), 2, "error: other model"),
        (OSError(errno.ENOSPC, "No space left", "runs/a"), 1, "runs/a: the disk is full"),
        (PermissionError(errno.EACCES, "denied", "runs/a"), 1, "runs/a: permission denied"),
        (OSError(errno.EROFS, "read-only", "runs/a"), 1, "read-only"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "the disk is full"),
    ],
)
def test_what_is_expected_to_fail_ends_in_one_sentence(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    (here / "r.yaml").write_text(SOUND)
    fail(monkeypatch, error)
    done = CliRunner().invoke(cli, ["run", "r.yaml"])
    assert done.exit_code == code
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    shown = CliRunner().invoke(cli, ["--debug", "run", "r.yaml"])
    assert shown.exception is error


def test_what_is_not_expected_keeps_its_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "r.yaml").write_text(SOUND)
    for error in (ZeroDivisionError("x"), BrokenPipeError(errno.EPIPE, "x"), OSError("no number")):
        assert explain_failure(error) is None
    fail(monkeypatch, ZeroDivisionError("x"))
    done = CliRunner().invoke(cli, ["run", "r.yaml"])
    assert (done.exit_code, type(done.exception)) == (1, ZeroDivisionError)


def test_an_interrupt_says_how_to_go_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "r.yaml").write_text(SOUND)
    fail(monkeypatch, KeyboardInterrupt())
    done = CliRunner().invoke(cli, ["run", "r.yaml"])
    assert done.exit_code == 130
    assert done.stderr.strip() == (
        "interrupted; the run folder keeps what is done; run the same command to go on"
    )


def test_a_real_interrupt_ends_with_130(here: Path) -> None:
    (here / "r.yaml").write_text(SOUND)
    # A job that a script puts in the background ignores SIGINT, and what it starts inherits that.
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import time\nfrom hawqkit import pipeline\nfrom hawqkit.cli import main\n"
        "def run(*_):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "pipeline.run = run\nimport sys\nsys.argv[1:] = ['run', 'r.yaml']\nmain()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr
