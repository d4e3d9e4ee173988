"""Seconds of the allocation on 210 layers x 6 formats, the shapes of SmolLM2-135M.

    python benchmarks/allocation.py [--tables N]

Prints the median and the slowest of: exact solve, the same with three budgets and with vLLM's
groups, whole frontier, 32 resampled solves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hawqkit.allocation import build_problem, keep_shares, solve, sweep_frontier

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from random_problems import (
    SIX,
    falling_scores,
    llama_layers,
    plain_size_table,
)


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Time every stage on several random tables and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=24, help="random tables to time")
    count = parser.parse_args().tables
    layers = llama_layers(30)
    size = plain_size_table(layers, SIX)
    times: dict[str, list[float]] = {}
    gaps = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        scores = falling_scores(layers, SIX, rng)
        bits = (3.0, 3.5, 4.0, 4.5)[seed % 4]
        one = build_problem(layers, SIX, scores, budgets={"average_bits": bits})
        fused = build_problem(layers, SIX, scores, budgets={"average_bits": bits}, runtime="vllm")
        budgets = {
            "average_bits": bits,
            "bits_per_weight": bits + 0.25,
            "size": 1000 + int(one.layers[0].numel * 0 + (bits + 0.25) * 106_168_320 / 8),
        }
        three = build_problem(layers, SIX, scores, budgets=budgets, sizes=[size])
        for name, problem in (("exact", one), ("exact, vllm", fused), ("exact, 3 budgets", three)):
            times.setdefault(name, []).append(seconds(lambda p=problem: solve(p)))
            gaps.append(solve(problem).certificate.relative_gap)
        choice = solve(one).choice
        times.setdefault("frontier", []).append(seconds(lambda: sweep_frontier(one, choice)))
        if seed < 4:
            noisy = lambda g: scores * np.exp(g.normal(0.0, 0.1, scores.shape))  # noqa: E731
            work = lambda: keep_shares(one, choice, noisy, generator=rng)  # noqa: E731
            times.setdefault("32 resamples", []).append(seconds(work))
    for name, values in times.items():
        print(f"{name:18s} median {np.median(values):6.3f} s   slowest {max(values):6.3f} s")
    print(f"largest relative gap {max(gaps):.1e}")


if __name__ == "__main__":
    main()
