"""What killed processes leave behind, and who may read what a run writes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import command_line
import pico
import pytest
import torch
from command_line import contents, invoke, succeed

from hawqkit.estimators.eigenpair_files import save_eigenpairs
from hawqkit.estimators.eigenpairs import Eigenpairs
from hawqkit.journal import Journal, sweep
from hawqkit.store import write_bytes_atomic

PROBE = ("probe", "r.yaml", "-o", "run")
# What `tempfile.mkstemp` makes of a name, in the folders of journals; and files of somebody else.
OURS = (
    "probe/.batch-00001.safetensors.ab_3d5z9",
    "probe/.facts.json.zzzzzzzz",
    "curvature/hessian-trace/.batch-00000.safetensors.aaaaaaaa",
)
FOREIGN = (
    "probe/.batch-00001.safetensors.ab_3d5z9.bak",
    "probe/.batch-1.safetensors.ab_3d5z9",
    "probe/.notes.json.aaaaaaaa",
    "probe/batch-00001.safetensors.aaaaaaaa",
    ".batch-00001.safetensors.aaaaaaaa",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pico.save(tmp_path / "model")
    (tmp_path / "r.yaml").write_text(command_line.RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plant(run: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"half")


def test_the_next_start_of_the_same_run_removes_what_a_kill_left(here: Path) -> None:
    succeed(*PROBE)
    before = set(contents(here / "run"))
    plant(here / "run", OURS + FOREIGN)
    # Another run is refused, and leaves the folder as it was.
    refused = invoke(*PROBE, "--set", "sensitivity.seed=7")
    assert refused.exit_code == 2
    assert set(contents(here / "run")) == before | set(OURS) | set(FOREIGN)
    succeed(*PROBE)
    assert set(contents(here / "run")) == before | set(FOREIGN)


def test_what_a_kill_in_a_write_leaves_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are those that writing makes, wherever it stops."""

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    journal = Journal(tmp_path / "journal", {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        patch.setattr(Path, "unlink", killed)  # nor does a killed process tidy up
        with pytest.raises(Killed):
            journal.write(3, {"x": torch.zeros(2).numpy()})
    assert len(list((tmp_path / "journal").iterdir())) == 2
    assert sweep(tmp_path / "journal") == 1
    assert [p.name for p in (tmp_path / "journal").iterdir()] == ["facts.json"]
    assert sweep(tmp_path / "missing") == 0


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_leaves(here: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        (here / "plain").write_text("x")
        write_bytes_atomic(here / "atomic", b"x")
        save_eigenpairs(
            here / "pairs.safetensors",
            Eigenpairs(
                torch.ones(1).double().numpy(), torch.zeros(1).double().numpy(), torch.ones(3, 1),
                torch.ones(1).bool().numpy(), 3, 1e-3, "magnitude", {"w": slice(0, 3)}, "",
            ),
        )  # fmt: skip
        if mask == 0o022:
            succeed(*PROBE)
    finally:
        os.umask(before)
    wanted = 0o666 & ~mask
    assert stat.S_IMODE((here / "plain").stat().st_mode) == wanted
    written = [here / "atomic", here / "pairs.safetensors"]
    if mask == 0o022:
        made = [p for p in (here / "run").rglob("*") if p.is_file() and p.name != ".lock"]
        assert here / "run" / "samples.safetensors" in made
        written += made
    assert {p.name for p in written if stat.S_IMODE(p.stat().st_mode) != wanted} == set()
