"""Two processes give what one gives, and a killed run ends like one that was left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import command_line
import numpy as np
import pico
import pytest
from processes import run_on_two

from hawqkit.records import Sensitivities, to_array
from hawqkit.store import read_record

RECIPE = """\
model: {{source: {model}}}
calibration: {{sequences: 40, length: 128, withheld: 8}}
held_out: {{sequences: 4, length: 64}}
layers: {{exclude: [lm_head, model.embed_tokens]}}
formats: [int3-g32, int4-g32, int8-g32]
sensitivity: {{batch: 2}}
budget: {{average_bits: 4.0}}
validate: {{baselines: [uniform]}}
stability: {{draws: 2}}
"""
PROBE = ["-m", "hawqkit", "probe"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("processes")
    model = pico.save(home / "model", pico.llama())
    (home / "pico.yaml").write_text(RECIPE.format(model=model))
    subprocess.run([sys.executable, *PROBE, "pico.yaml", "-o", "one"], cwd=home, check=True)
    return home


@pytest.mark.timeout(400)  # an interpreter for each of two processes, on cores that others use
def test_two_processes_give_what_one_gives(home: Path) -> None:
    assert "2 processes on cpu" in run_on_two(*PROBE, "pico.yaml", "-o", "two", folder=home)
    assert json.loads((home / "two/provenance.json").read_text())["processes"] == 2
    one, two = (read_record(home / n / "sensitivities.json", Sensitivities) for n in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    for name, score in one.scores.items():
        np.testing.assert_allclose(
            to_array(two.scores[name].values), to_array(score.values), rtol=1e-5
        )


# Started instead of `hawqkit`: says which process puts which file in its place.
WITNESS = """\
import os, sys
log = os.open(f"writes-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def hook(event, arguments):
    if event == "os.rename":
        os.write(log, f"{os.path.relpath(arguments[1])}\\n".encode())
sys.addaudithook(hook)
from hawqkit.cli import main
main()
"""
SEVERAL_TIMES = {"provenance.json", "report.html"}  # grow from stage to stage
STAGES = ["round", "probe", "validate on held-out"]


def test_accelerate_launch_runs_everything_in_two_processes_and_writes_once(home: Path) -> None:
    (home / "witness.py").write_text(WITNESS)
    launcher = [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", "witness.py",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, "run", "pico.yaml", "-o", "launched"],
        cwd=home,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"2 processes on cpu\S*, cpu", done.stdout)) == 1
    assert json.loads((home / "launched/provenance.json").read_text())["processes"] == 2
    for stage in STAGES:  # a second process's bar would bring a second end
        ends = re.findall(rf"{stage} 100%", done.stderr)
        assert len(ends) == 1, done.stderr
    written = [Counter(path.read_text().split()) for path in home.glob("writes-*")]
    counts = [{Path(n): c for n, c in w.items() if n.startswith("launched/")} for w in written]
    shared, rest = sorted((c for c in counts if c), key=len, reverse=True)
    assert set(shared).isdisjoint(rest), "two processes wrote one file"
    assert {path.parent for path in rest} == {Path("launched/probe")}
    assert all(n == 1 for path, n in shared.items() if path.name not in SEVERAL_TIMES), shared
    assert set(rest.values()) == {1}
    one, two = (
        read_record(home / n / "sensitivities.json", Sensitivities) for n in ("one", "launched")
    )
    assert one.fingerprint == two.fingerprint
    for name, score in one.scores.items():
        np.testing.assert_allclose(
            to_array(two.scores[name].values), to_array(score.values), rtol=1e-5
        )
    for name in ("allocation.json", "frontier.json", "validation.json", "report.html", "exports"):
        assert (home / "launched" / name).exists()


def test_a_probe_killed_five_times_at_random_ends_with_the_same_bits(home: Path) -> None:
    """Moments: a number of finished micro-batches, one in each fifth of the run, and a delay.

    Both are random with a fixed seed; the delay is a share of the time that a micro-batch took.
    """
    journal = home / "killed" / "probe"
    arguments = ["probe", "pico.yaml", "-o", "killed"]
    count = len(list((home / "one" / "probe").glob("batch-*")))
    costs = json.loads((home / "one" / "provenance.json").read_text())["costs"]
    seconds = costs["probe"]["seconds"] / count
    generator = random.Random(3)
    moments = [
        (int((count - 1) * (fifth + generator.random()) / 5), generator.random() * seconds)
        for fifth in range(5)
    ]
    # Forked from one process that has imported everything: seconds are saved five times.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["command_line", "hawqkit.pipeline.running", "transformers.models.llama.modeling_llama"]
    )
    ends, left = [], []
    for finished, delay in moments:
        process = context.Process(
            target=command_line.run_silently, args=(str(home), *arguments), daemon=True
        )
        process.start()
        while process.is_alive() and len(list(journal.glob("batch-*"))) < finished:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        ends.append(process.exitcode)
        left.append(len(list(journal.glob("batch-*"))))
    told = f"(micro-batches, seconds): {moments}; exit codes {ends}; in the journal {left}"
    assert ends == [-signal.SIGKILL] * 5, told
    assert left[-1] < count, told
    done = subprocess.run(
        [sys.executable, "-m", "hawqkit", *arguments],
        cwd=home,
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"{left[-1]} of {count} micro-batches from the journal" in done.stdout, told
    for name in ("sensitivities.json", "samples.safetensors"):
        assert (home / "killed" / name).read_bytes() == (home / "one" / name).read_bytes(), told


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
