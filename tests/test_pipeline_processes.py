"""Two processes give what one gives, and a killed run ends like one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pico
import pytest

from hawqkit.records import Sensitivities, to_array
from hawqkit.store import read_record

RECIPE = """\
model: {{source: {model}}}
calibration: {{sequences: 20, length: 64, withheld: 4}}
held_out: {{sequences: 4, length: 64}}
layers: {{exclude: [lm_head, model.embed_tokens]}}
formats: [int3-g32, int4-g32, int8-g32]
sensitivity: {{batch: 2}}
budget: {{average_bits: 4.0}}
"""
PROBE = ["-m", "hawqkit", "probe"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("processes")
    model = pico.save(home / "model", pico.llama())
    (home / "pico.yaml").write_text(RECIPE.format(model=model))
    subprocess.run([sys.executable, *PROBE, "pico.yaml", "-o", "one"], cwd=home, check=True)
    return home


def test_two_processes_give_what_one_gives(home: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, *PROBE, "pico.yaml", "-o", "two"],
        cwd=home,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes on cpu" in done.stdout
    assert json.loads((home / "two/provenance.json").read_text())["processes"] == 2
    one, two = (read_record(home / n / "sensitivities.json", Sensitivities) for n in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    for name, score in one.scores.items():
        np.testing.assert_allclose(
            to_array(two.scores[name].values), to_array(score.values), rtol=1e-5
        )


def test_a_killed_probe_started_again_ends_with_the_same_bits(home: Path) -> None:
    journal = home / "killed" / "probe"
    command = [sys.executable, *PROBE, "pico.yaml", "-o", "killed"]
    for wanted in (1, 5):  # killed once near the beginning, and once more half-way
        process = subprocess.Popen(command, cwd=home, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            if len(list(journal.glob("batch-*"))) >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.wait()
    subprocess.run(command, cwd=home, check=True)
    for name in ("sensitivities.json", "samples.safetensors"):
        assert (home / "killed" / name).read_bytes() == (home / "one" / name).read_bytes()


def test_a_folder_of_another_text_is_refused_and_stays_as_it_was(home: Path) -> None:
    before = {p: p.read_bytes() for p in (home / "one").rglob("*") if p.is_file()}
    command = [sys.executable, *PROBE, "pico.yaml", "-o", "one", "--set", "calibration.seed=5"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "data: there" in done.stderr
    assert {p: p.read_bytes() for p in (home / "one").rglob("*") if p.is_file()} == before


def test_an_impossible_size_is_refused_before_anything_is_written(home: Path) -> None:
    budget = ["--set", "budget.average_bits=null", "--set", "budget.size=1kB"]
    command = [sys.executable, *PROBE, "pico.yaml", "-o", "impossible", *budget]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "bytes" in done.stderr
    assert not (home / "impossible").exists()
