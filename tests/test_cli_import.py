"""`hawqkit import`: a foreign mix beside a run's own, predicted, measured and reported."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
from command_line import RECIPE, invoke, succeed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("import")
    pico.save(folder / "model")
    (folder / "small.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HAWQKIT_CACHE", str(folder / "cache"))
        succeed("run", "small.yaml", "-o", "run")
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def checkpoint(folder: Path, **settings: object) -> Path:
    """Write the configuration of a GPTQ checkpoint."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, **settings}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def baselines(here: Path) -> dict[str, dict[str, object]]:
    found = json.loads((here / "run/allocation.json").read_text())["baselines"]
    return {mix["name"]: mix for mix in found}


def test_a_mix_of_probed_formats_is_predicted_as_the_run_predicts(here: Path) -> None:
    before = json.loads((here / "run/allocation.json").read_text())
    layers = before["layers"]
    dynamic = {f"-:{n.replace('.', '[.]')}$": {} for n, f in layers.items() if f == "none"}
    for name, format_name in layers.items():
        if format_name != "none":
            bits = int(format_name[3])
            dynamic[f"+:{name.replace('.', '[.]')}$"] = {"bits": bits, "lm_head": True}
    checkpoint(here / "same", dynamic=dynamic, lm_head=True)
    output = succeed("import", "run", "same").output
    mix = baselines(here)["same"]
    assert mix["layers"] == layers
    for key in ("kl", "joint", "kl_stderr", "sequences"):
        assert mix["prediction"][key] == before["prediction"][key]  # type: ignore[index]
    assert mix["objective"] == pytest.approx(before["objective"], rel=1e-9)
    assert mix["totals"]["average_bits"] == before["totals"]["average_bits"]  # type: ignore[index]
    assert output.count("predicted KL") == 2
    assert "next: hawqkit validate run" in output


def test_it_is_measured_and_reported_also_with_formats_that_were_not_probed(here: Path) -> None:
    checkpoint(here / "other", bits=3, group_size=-1)
    output = succeed("import", "run", "other", "--name", "somebody's").output
    assert "int3-channel not probed in this run" in output
    succeed("validate", "run")
    measured = json.loads((here / "run/validation.json").read_text())["mixes"]
    mine = {m["name"]: m for m in measured}
    assert mine["somebody-s"]["prediction"] is None
    text = next(iter(mine["somebody-s"]["measured"].values()))
    assert text["kl"] > 0
    succeed("report", "run")
    assert "somebody-s" in (here / "run/report.html").read_text()
    assert "somebody-s" in succeed("show", "run").output
    succeed("import", "run", "other", "--name", "somebody's")  # again: replaced, not doubled
    assert list(baselines(here)).count("somebody-s") == 1


def test_what_cannot_be_imported_changes_nothing(here: Path) -> None:
    checkpoint(here / "wide", group_size=128)
    checkpoint(here / "taken")
    before = (here / "run/allocation.json").read_bytes()
    for arguments, words in (
        (["wide"], "'int4-g128' does not fit its 64 columns"),
        (["taken", "--name", "chosen"], "is taken by a mix that hawqkit made"),
        (["taken", "--name", "uniform"], "is taken by a mix that hawqkit made"),
    ):
        done = invoke("import", "run", *arguments)
        assert done.exit_code == 2
        assert words in done.output
    assert (here / "run/allocation.json").read_bytes() == before
