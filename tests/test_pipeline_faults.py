"""Disks that are full or closed, and journals that were damaged: a clear end or the same result."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
from command_line import RECIPE, SCREEN, contents, invoke, succeed

from hawqkit import store
from hawqkit.journal import Journal

PROBE = ("probe", "r.yaml", "-o", "run", "--set", "sensitivity.batch=2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its model, and a probe of three micro-batches in `run`."""
    home = tmp_path_factory.mktemp("faults")
    pico.save(home / "model")
    (home / "r.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        succeed(*PROBE)
    assert len(list((home / "run/probe").glob("batch-*"))) == 3
    return home


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the recipe and the model, without the run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "model", tmp_path / "model")
    shutil.copy(made / "r.yaml", tmp_path / "r.yaml")
    return tmp_path


@pytest.fixture
def copied(made: Path, here: Path) -> Path:
    """Return a copy of the run that has its journal alone, as a killed probe leaves it."""
    shutil.copytree(made / "run" / "probe", here / "run" / "probe")
    return here / "run"


RESULTS = ("sensitivities.json", "samples.safetensors")


def results(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in RESULTS}


def damaged(whole: bytes, how: str, size: int) -> bytes:
    """Return a file's bytes after one fault; `size` is that of safetensors' header."""
    if how.startswith("cut"):
        keep = {"to nothing": 0, "to 4": 4, "to 8": 8, "in the header": 8 + size // 2,
                "after the header": 8 + size, "in the middle": len(whole) // 2,
                "by one": len(whole) - 1}[how.removeprefix("cut ")]  # fmt: skip
        return whole[:keep]
    if how == "longer":
        return whole + b"\0" * 8
    if how == "zeros":
        return bytes(len(whole))
    place = {"the length": 0, "the header": 8 + size // 2, "the first number": 8 + size,
             "the last number": len(whole) - 1}[how.removeprefix("flip in ")]  # fmt: skip
    return whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]


FAULTS = [
    *(f"cut {place}" for place in ("to nothing", "to 4", "to 8", "in the header",
                                   "after the header", "in the middle", "by one")),
    *(f"flip in {place}" for place in ("the length", "the header", "the first number",
                                       "the last number")),
    "longer",
    "zeros",
]  # fmt: skip


@pytest.mark.parametrize("how", FAULTS)
def test_a_damaged_journal_entry_is_measured_again_to_the_same_bits(
    made: Path, copied: Path, how: str
) -> None:
    entry = copied / "probe" / "batch-00001.safetensors"
    whole = entry.read_bytes()
    entry.write_bytes(damaged(whole, how, int.from_bytes(whole[:8], "little")))
    done = succeed(*PROBE)
    assert "2 of 3 micro-batches from the journal" in done.stdout
    assert entry.read_bytes() == whole
    assert results(copied) == results(made / "run")


def test_no_flipped_bit_of_an_entry_is_believed(made: Path, tmp_path: Path) -> None:
    """Every byte of the header and some of the numbers, one bit each: None, or unchanged."""
    source = made / "run" / "probe"
    facts = store.json.loads((source / "facts.json").read_text())
    shutil.copytree(source, tmp_path / "probe")
    journal = Journal(tmp_path / "probe", facts)
    entry = tmp_path / "probe" / "batch-00000.safetensors"
    whole = entry.read_bytes()
    true = journal.read(0)
    assert true is not None
    header = 8 + int.from_bytes(whole[:8], "little")
    step = max(1, (len(whole) - header) // 200)
    for place in (*range(header), *range(header, len(whole), step)):
        entry.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]
        )
        found = journal.read(0)
        if found is not None:  # a flip in the header's padding changes nothing
            assert sorted(found) == sorted(true), place
            assert all(found[name].tobytes() == true[name].tobytes() for name in true), place


def test_an_entry_of_another_place_or_journal_is_not_taken(made: Path, copied: Path) -> None:
    folder = copied / "probe"
    shutil.copy(folder / "batch-00000.safetensors", folder / "batch-00001.safetensors")
    arrays, metadata = store.read_arrays(folder / "batch-00002.safetensors")
    foreign = {**metadata, "fingerprint": "0" * 64}
    store.write_arrays(folder / "batch-00002.safetensors", arrays, foreign)
    done = succeed(*PROBE)
    assert "1 of 3 micro-batches from the journal" in done.stdout
    assert results(copied) == results(made / "run")


@pytest.mark.parametrize("content", ["", '{"model": ', "[1]", "[" * 100_000, '{"model": 3}'])
def test_a_journal_whose_facts_are_damaged_is_refused(copied: Path, content: str) -> None:
    (copied / "probe" / "facts.json").write_text(content)
    before = contents(copied)
    done = invoke(*PROBE)
    assert done.exit_code == 2, done.output
    assert "probe" in done.stderr
    assert len(done.stderr.splitlines()) <= SCREEN
    assert contents(copied) == before


def test_entries_without_their_facts_are_refused(copied: Path) -> None:
    (copied / "probe" / "facts.json").unlink()
    done = invoke(*PROBE)
    assert done.exit_code == 2
    assert "holds 3 results but no facts.json" in done.stderr


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_result_that_was_cut_is_made_again_from_the_journal(
    made: Path, copied: Path, name: str, share: float
) -> None:
    for result, data in results(made / "run").items():
        (copied / result).write_bytes(data[: int(len(data) * share)] if result == name else data)
    done = succeed(*PROBE)
    assert "3 of 3 micro-batches from the journal" in done.stdout
    assert results(copied) == results(made / "run")


class FullAfter:
    """Stands for `os.fsync`: from the n-th call on, the disk is full."""

    def __init__(self, calls: int, number: int) -> None:
        self.left, self.number = calls, number

    def __call__(self, descriptor: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))


WORDS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your disk quota is used up",
         errno.EROFS: "the file system is read-only"}  # fmt: skip


@pytest.mark.parametrize("calls", [0, 1, 2, 5, 8, 11])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_ends_in_words_and_the_same_command_goes_on(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch, calls: int, number: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", FullAfter(calls, number))
        done = invoke(*PROBE)
    assert done.exit_code == 1, done.output
    assert WORDS[number] in done.stderr
    assert not [p for p in (here / "run").rglob(".*") if p.name != ".lock"]  # no part of a file
    succeed(*PROBE)
    assert results(here / "run") == results(made / "run")


def test_a_disk_that_refuses_the_last_step_of_every_write_leaves_no_part_of_a_file(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a", None, "b")

    monkeypatch.setattr(Path, "replace", full)
    done = invoke(*PROBE)
    assert done.exit_code == 1
    assert "the disk is full" in done.stderr
    assert set(contents(here / "run")) == set()


def limited() -> None:
    """Let a process write no file beyond 20 kB: the system itself then refuses, in mid-write."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_write_that_the_system_cuts_short_ends_with_one_and_is_made_good(
    made: Path, here: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hawqkit", *PROBE],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited,
    )
    assert done.returncode == 1, done.stderr
    assert "too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [p for p in (here / "run").rglob(".*") if p.name != ".lock"]
    succeed(*PROBE)
    assert results(here / "run") == results(made / "run")


@pytest.fixture
def readonly(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder that nobody may write to; for root, whom no mode stops, calls are refused."""
    folder = here / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        refuse_below(monkeypatch, folder)
    yield folder
    folder.chmod(0o755)


def refuse_below(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(path: Any, *rest: Any, **options: Any) -> Any:
            if Path(path).absolute().is_relative_to(folder) and Path(path).absolute() != folder:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path, *rest, **options)

        return guarded

    monkeypatch.setattr(os, "mkdir", guard(os.mkdir))
    monkeypatch.setattr(os, "open", guard(os.open))


@pytest.mark.parametrize("verb", ["run", "probe"])
def test_a_folder_that_cannot_be_written_ends_with_one_and_says_so(
    here: Path, readonly: Path, verb: str
) -> None:
    done = invoke(verb, "r.yaml", "-o", "closed/run")
    assert done.exit_code == 1, done.output
    assert "closed/run: permission denied; choose a place that you may write to" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(readonly.iterdir())


@pytest.mark.parametrize("verb", ["run", "probe"])
def test_a_file_in_the_way_of_the_run_folder_is_said(here: Path, verb: str) -> None:
    (here / "file").write_text("mine")
    done = invoke(verb, "r.yaml", "-o", "file/run")
    assert done.exit_code == 1, done.output
    assert "a part of this path is a file" in done.stderr
    assert invoke(verb, "r.yaml", "-o", "file").exit_code == 2
    assert (here / "file").read_text() == "mine"
