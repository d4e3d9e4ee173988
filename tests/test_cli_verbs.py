from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pico
import pytest
from click.testing import CliRunner, Result
from command_line import RECIPE

from hawqkit.cli import cli
from hawqkit.targets import compressed_tensors


def call(*arguments: str) -> Result:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its pico model, and the run that the command line made."""
    folder = tmp_path_factory.mktemp("verbs")
    pico.save(folder / "model")
    (folder / "small.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HAWQKIT_CACHE", str(folder / "cache"))
        call("run", "small.yaml", "--set", "budget.average_bits=4.25")
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_run_writes_a_folder_named_after_the_recipe_with_every_stage(here: Path) -> None:
    names = {p.name for p in (here / "runs" / "small").iterdir()}
    assert names >= {
        "recipe.yaml",
        "sensitivities.json",
        "allocation.json",
        "frontier.json",
        "validation.json",
        "provenance.json",
        "report.html",
        "exports",
    }
    allocation = json.loads((here / "runs/small/allocation.json").read_text())
    assert allocation["budgets"] == {"average_bits": 4.25}
    assert allocation["totals"]["average_bits"] <= 4.25


def test_check_says_what_would_happen_and_writes_nothing(here: Path) -> None:
    before = files(here)
    output = call("check", "small.yaml").output
    assert "14 layers" in output
    assert files(here) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["budget.size=1kB", "export=[compressed-tensors]"], "size = 1,000 bytes cannot be met"),
        (["layers.include=[nothing.like.this]"], "nothing.like.this"),
        (["formats=[int4-g128]"], "64 columns do not divide into groups of int4-g128"),
        (["calibration.source=missing.txt"], "missing.txt"),
        (["calibration.sequences=1000000"], "1000000"),
    ],
)
def test_check_refuses_what_the_model_and_text_do_not_allow_and_writes_nothing(
    here: Path, overrides: list[str], words: str
) -> None:
    before = files(here)
    options = [part for override in overrides for part in ("--set", override)]
    done = CliRunner().invoke(cli, ["check", "small.yaml", *options])
    assert done.exit_code == 2, done.output
    assert words in done.stderr.replace(",000,000", "000000")
    assert len(done.stderr.splitlines()) <= 24
    assert files(here) == before


def test_probe_stops_after_the_sensitivities(here: Path) -> None:
    output = call("probe", "small.yaml", "-o", "probed").output
    assert "hawqkit allocate probed" in output
    assert (here / "probed" / "sensitivities.json").is_file()
    assert not (here / "probed" / "allocation.json").exists()
    assert (here / "probed" / "sensitivities.json").read_bytes() == (
        here / "runs/small/sensitivities.json"
    ).read_bytes()


def test_allocate_chooses_again_elsewhere_or_in_place(here: Path) -> None:
    before = files(here / "runs")
    output = call(
        "allocate", "runs/small", "--budget", "average_bits=6", "--budget", "bits_per_weight=7.5",
        "--score", "trace", "--runtime", "vllm", "--risk", "0.5", "-o", "six.json",
    ).output  # fmt: skip
    assert files(here / "runs") == before
    written = json.loads((here / "six.json").read_text())
    assert written["budgets"] == {"average_bits": 6.0, "bits_per_weight": 7.5}
    assert (written["score"], written["runtime"], written["risk"]) == ("trace", "vllm", 0.5)
    mix = written["layers"]
    for block in range(2):
        attention = {mix[f"model.layers.{block}.self_attn.{x}_proj"] for x in "qkv"}
        assert len(attention) == 1
    assert f"{written['totals']['average_bits']:.4f} average bits" in output
    assert "written to six.json" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "average_bits=2"], "take at least 3 and at most 8"),
        (["--budget", "avrage_bits=4"], "Did you mean 'average_bits'?"),
        (["--score", "tokn"], "Did you mean 'token'?"),
        (["--runtime", "vlm"], "Did you mean 'vllm'?"),
    ],
)
def test_allocate_refuses_what_cannot_be_and_writes_nothing(
    here: Path, arguments: list[str], words: str
) -> None:
    before = files(here)
    done = CliRunner().invoke(cli, ["allocate", "runs/small", *arguments])
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert files(here) == before


def test_validate_measures_the_same_again(here: Path) -> None:
    file = here / "runs/small/validation.json"
    before = file.read_bytes()
    output = call("validate", "runs/small").output
    assert "uniform" in output
    assert file.read_bytes() == before


def test_export_writes_where_it_is_told(here: Path) -> None:
    call("export", "runs/small", "--target", "bits", "-o", "out")
    written = json.loads((here / "out" / "bits.json").read_text())
    allocation = json.loads((here / "runs/small/allocation.json").read_text())
    assert written["layers"] == allocation["layers"]
    done = CliRunner().invoke(cli, ["export", "runs/small", "--target", "bts", "-o", "other"])
    assert done.exit_code == 2
    assert "Did you mean 'bits'?" in done.stderr
    assert not (here / "other").exists()


def test_export_of_names_alone_needs_neither_torch_nor_the_model_and_writes_what_run_does(
    here: Path,
) -> None:
    (here / "model").rename(here / "elsewhere")
    try:
        code = (
            "import sys\nfrom hawqkit.cli import cli\n"
            "cli(['export', 'runs/small', '--target', 'bits', '-o', 'again'], "
            "standalone_mode=False)\n"
            "print(sorted({'torch', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)))"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        (here / "elsewhere").rename(here / "model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["written to again", "[]"]
    written = [p.name for p in (here / "again").iterdir()]
    assert written == [p.name for p in (here / "runs/small/exports/bits").iterdir()]
    for name in written:
        original = here / "runs/small/exports/bits" / name
        assert (here / "again" / name).read_bytes() == original.read_bytes()


def test_export_lists_ten_problems_of_a_target_and_counts_the_others(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a target refuses is refused before the probe too, so a mix that it cannot hold is made.
    told = [f"layer {n} is wrong." for n in range(23)]
    monkeypatch.setattr(compressed_tensors, "problems", lambda mix, layers, facts: told)
    done = CliRunner().invoke(
        cli, ["export", "runs/small", "--target", "compressed-tensors", "-o", "refused"]
    )
    assert done.exit_code == 2, done.output
    lines = done.stderr.splitlines()
    assert lines[0] == "error: target 'compressed-tensors' cannot hold this mix: 23 problems"
    assert lines[1:] == [*(f"  - {line}" for line in told[:10]), "  and 13 more"]
    assert not (here / "refused").exists()


def test_check_lists_ten_problems_of_a_target_and_counts_the_others(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(mix: dict[str, str], layers: object, facts: object) -> list[str]:
        return [f"no {name}." for name in sorted(set(mix.values()))]

    monkeypatch.setattr(compressed_tensors, "problems", told)
    formats = [f"int{bits}-{group}" for bits in (2, 3, 4, 5, 6, 8) for group in ("g32", "g64")]
    done = CliRunner().invoke(
        cli,
        ["check", "small.yaml", "--set", "export=[compressed-tensors]",
         "--set", f"formats=[{', '.join(formats)}]"],
    )  # fmt: skip
    assert done.exit_code == 2, done.output
    lines = done.stderr.splitlines()
    assert lines[1:] == [*(f"  - no {name}." for name in formats[:10]), "  and 2 more"]


def test_report_and_show_tell_of_the_run(here: Path) -> None:
    assert "written to again.html" in call("report", "runs/small", "-o", "again.html").output
    page = (here / "again.html").read_text()
    assert "model.layers.0.self_attn.q_proj" in page
    short, full = call("show", "runs/small").output, call("show", "runs/small", "--full").output
    assert "uniform" in short
    assert len(full) >= len(short)


@pytest.mark.parametrize(
    "arguments",
    [["allocate", "runs/small", "-o", "x.json"], ["report", "runs/small"], ["show", "runs/small"]],
)
def test_verbs_on_records_import_no_torch(here: Path, arguments: list[str]) -> None:
    code = (
        "import sys\nfrom hawqkit.cli import cli\n"
        f"cli({arguments!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
