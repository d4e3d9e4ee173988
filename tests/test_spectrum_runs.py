"""`hawqkit spectrum`, and `run` with a section `spectrum`: killed, resumed, shown, reported."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import shutil
import signal
import time
from pathlib import Path

import command_line
import pico
import pytest
import torch
from command_line import RECIPE, contents, invoke, refuse, sets, succeed
from processes import run_on_two

from hawqkit.estimators.lanczos import Lanczos
from hawqkit.journal import Journal
from hawqkit.pipeline.folder import RunFolder
from hawqkit.recipe import load_recipe

SECTION = """\
spectrum: {layers: ["*.0.*.v_proj", "*.o_proj"], global: true, top: 2, steps: 12, draws: 3,
           eps: [1.0e-2, 1.0e-9], sequences: 2, length: 12}
"""
FILES = ("spectrum.json", "spectrum.safetensors")
SPECTRUM = ("spectrum", "r.yaml", "-o", "run")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its model, and a finished spectrum in `run`."""
    home = tmp_path_factory.mktemp("spectrum")
    pico.save(home / "model", pico.llama(hidden=16, intermediate=32))
    (home / "r.yaml").write_text(RECIPE.replace("-g32", "-channel") + SECTION)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        succeed(*SPECTRUM)
    return home


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the recipe and the model, without the run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "model", tmp_path / "model")
    shutil.copy(made / "r.yaml", tmp_path / "r.yaml")
    return tmp_path


def records(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_the_run_folder_holds_record_tridiagonals_and_eigenvectors(made: Path) -> None:
    found = RunFolder(made / "run").read_spectrum()
    assert found is not None
    assert [b.name for b in found.blocks] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    assert found.whole is not None
    assert found.densities[found.whole.name].alphas.shape == (3, 12)
    assert len(list((made / "run/spectrum").glob("*/eigenpairs.safetensors"))) == 4
    assert load_recipe(made / "run/recipe.yaml", []).spectrum is not None


@pytest.mark.parametrize("step", [3, 25])
def test_a_spectrum_killed_within_a_draw_ends_with_the_same_bytes(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    advance, left = Lanczos.advance, [step]

    def killed(self: Lanczos) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Lanczos, "advance", killed)
        assert invoke(*SPECTRUM).exit_code == 130
    assert not (here / "run/spectrum.json").exists()
    succeed(*SPECTRUM)
    assert records(here / "run") == records(made / "run")


@pytest.mark.parametrize("entries", [0, 1, 3])
def test_a_spectrum_killed_between_blocks_ends_with_the_same_bytes(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    write, left = Journal.write, [entries]

    def killed(self: Journal, *arguments: object) -> None:
        left[0] -= self.folder.name == "spectrum"
        if left[0] < 0:
            raise KeyboardInterrupt
        write(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", killed)
        assert invoke(*SPECTRUM).exit_code == 130
    assert len(list((here / "run/spectrum").glob("batch-*"))) == entries
    succeed(*SPECTRUM)
    assert records(here / "run") == records(made / "run")


def test_a_spectrum_killed_five_times_at_random_ends_with_the_same_bytes(
    made: Path, here: Path
) -> None:
    """Killed by the system, without a last word, when a random number of files has been kept."""
    count = sum(path.is_file() for path in (made / "run/spectrum").rglob("*"))
    generator = random.Random(5)
    moments = sorted(generator.sample(range(count), 5))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["command_line", "hawqkit.pipeline.spectral", "transformers.models.llama.modeling_llama"]
    )
    journal, ends, left = here / "run/spectrum", [], []
    for kept in moments:
        process = context.Process(
            target=command_line.run_silently, args=(str(here), *SPECTRUM), daemon=True
        )
        process.start()
        while process.is_alive() and sum(p.is_file() for p in journal.rglob("*")) < kept:
            time.sleep(0.001)
        time.sleep(generator.random() * 0.05)
        process.kill()
        process.join()
        ends.append(process.exitcode)
        left.append(sum(p.is_file() for p in journal.rglob("*")))
    told = f"kept files at the kill: {moments} of {count}; exit codes {ends}; afterwards {left}"
    assert ends == [-signal.SIGKILL] * 5, told
    assert not (here / "run/spectrum.json").exists(), told
    succeed(*SPECTRUM)
    assert records(here / "run") == records(made / "run"), told


def test_a_finished_spectrum_is_taken_and_its_folder_is_a_run(made: Path) -> None:
    before = records(made / "run")
    done = succeed("spectrum", str(made / "run"))
    assert "taken from the run folder" in done.stdout
    assert records(made / "run") == before


def test_show_and_report_work_on_a_spectrum_alone(made: Path, tmp_path: Path) -> None:
    shown = succeed("show", str(made / "run")).stdout
    for words in ("Numerical rank", "particip.", "Top eigenvalues of whole network", "noise floor"):
        assert words in shown
    assert "Negative curvature" not in shown
    succeed("report", str(made / "run"), "-o", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert page.count('<section id="spectrum">') == 1
    assert page.count("<svg") == 2
    for words in ("stable rank", "participation ratio", "entropy rank", "eps lifted to"):
        assert words in page
    assert "eigenvalues are below" in page


def test_a_run_measures_it_and_its_report_has_the_section(made: Path, here: Path) -> None:
    succeed("run", "r.yaml", "-o", "run")
    assert records(here / "run") == records(made / "run")
    assert '<section id="spectrum">' in (here / "run/report.html").read_text()
    cost = json.loads((here / "run/provenance.json").read_text())["costs"]["spectrum"]
    assert cost["gradient_equivalents"] > 10 * 3 * 12  # more than one a product of a draw


def test_check_predicts_its_time_and_writes_nothing(here: Path) -> None:
    before = contents(here)
    assert re.search(r"predicted time: .*spectrum \d+ s", succeed("check", "r.yaml").stdout)
    assert contents(here) == before
    (here / "r.yaml").write_text(RECIPE.replace("-g32", "-channel"))
    assert "spectrum" not in succeed("check", "r.yaml").stdout


def test_a_long_spectrum_says_beforehand_what_it_takes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hawqkit.pipeline.spectral.LONG", 0.0)
    options = ("--set", "spectrum.global=false", "--set", "spectrum.draws=2")
    assert "spectrum: about" in succeed("spectrum", "r.yaml", "-o", "run", *options).stdout
    again = succeed("spectrum", "run").stdout
    assert "spectrum: about" not in again  # there is nothing left to do


def test_a_hessians_negative_eigenvalues_are_shown(here: Path) -> None:
    options = ("--set", "spectrum.kind=hessian", "--set", "spectrum.global=false")
    shown = succeed("spectrum", "r.yaml", "-o", "run", *options).stdout
    assert "Negative curvature" in shown
    found = RunFolder(here / "run").read_spectrum()
    assert found is not None
    assert all(block.smallest < 0 for block in found.blocks)
    assert all(block.ranks.negative[0].value > 0 for block in found.blocks)


def test_a_run_without_the_section_is_what_it_was(here: Path) -> None:
    (here / "r.yaml").write_text(RECIPE.replace("-g32", "-channel"))
    succeed("run", "r.yaml", "-o", "run")
    assert not any("spectrum" in name for name in contents(here / "run"))
    assert "spectrum" not in (here / "run/recipe.yaml").read_text()
    assert 'id="spectrum"' not in (here / "run/report.html").read_text()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("spectrum.layer=all", "unknown key; known here: kind, layers, global"),
        ("spectrum.kind=fisher", "gauss-newton, hessian"),
        ("spectrum.layers=top-0", "no choice of layers"),
        ("spectrum.layers=[nothing.*]", "matches none"),
        ("spectrum.layers=top-99", "more than the"),
        ("spectrum.eps=[0.1, -1.0]", "above 0"),
        ("spectrum.eps=[0.1, 0.1]", "twice"),
        ("spectrum.draws=0", "at least 1"),
        ("spectrum.length=100000", "positions"),
        ("spectrum={layers: [], global: false}", "measures nothing"),
    ],
)
def test_a_bad_section_is_refused_before_anything_is_written(
    here: Path, setting: str, words: str
) -> None:
    refuse(here, "spectrum", "r.yaml", "-o", "new", "--set", setting, words=words)


def test_a_folder_that_is_no_run_is_refused(here: Path) -> None:
    (here / "empty").mkdir()
    refuse(here, "spectrum", "empty", words="no run folder")


@pytest.mark.timeout(400)  # an interpreter for each of two processes, on cores that others use
def test_two_processes_give_what_one_gives(here: Path) -> None:
    # GPT-2 in float64: unlike Llama's, its norms and softmax stay there.
    pico.save(here / "double", pico.gpt2(dtype=torch.float64, hidden=16))
    settings = sets(
        "model.source=double",
        "layers.exclude=[lm_head, transformer.wte]",
        "spectrum.layers=['*.0.attn.*']",
    )
    succeed(*SPECTRUM[:3], "one", *settings)
    run_on_two("-m", "hawqkit", *SPECTRUM[:3], "two", *settings)
    assert json.loads((here / "two/provenance.json").read_text())["processes"] == 2
    one, two = (RunFolder(here / name).read_spectrum() for name in ("one", "two"))
    assert one is not None
    assert two is not None
    for a, b in zip(one.everything, two.everything, strict=True):
        assert a.top is not None
        assert b.top is not None
        assert b.top.values == pytest.approx(a.top.values, rel=1e-6)
        assert a.statistics is not None
        assert b.statistics is not None
        for name in ("trace", "frobenius", "participation", "entropy"):
            alone, shared = getattr(a.statistics, name), getattr(b.statistics, name)
            assert shared.value == pytest.approx(alone.value, rel=1e-6)
            assert shared.stderr == pytest.approx(alone.stderr, rel=1e-4, abs=1e-12)
        assert b.products == a.products
