"""Seconds of the allocation on 210 layers x 6 formats, the shapes of SmolLM2-135M.

    python benchmarks/allocation.py [--tables N]

Prints the median and the slowest of: exact solve, the same with vLLM's groups and with three
budgets, whole frontier, 32 resampled solves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hawqkit.allocation import build_problem, keep_shares, solve, sweep_frontier

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from random_problems import SIX, falling_scores, llama_layers, plain_size_table

WIDTHS = (3.0, 3.5, 4.0, 4.5)


def noisy(scores: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    return scores * np.exp(generator.normal(0.0, 0.1, scores.shape))


def time_table(seed: int) -> Iterator[tuple[str, float]]:
    """Yield (stage, seconds) for one random table."""
    layers = llama_layers(30)
    generator = np.random.default_rng(seed)
    scores = falling_scores(layers, SIX, generator)
    bits = WIDTHS[seed % len(WIDTHS)]
    size_bytes = 1000 + int((bits + 0.25) * sum(layer.numel for layer in layers) / 8)
    three = {"average_bits": bits, "bits_per_weight": bits + 0.25, "size": size_bytes}
    build = partial(build_problem, layers, SIX, scores)
    plain = build(budgets={"average_bits": bits})
    problems = {
        "exact": plain,
        "exact, vllm": build(budgets={"average_bits": bits}, runtime="vllm"),
        "exact, 3 budgets": build(budgets=three, sizes=[plain_size_table(layers, SIX)]),
    }
    for name, problem in problems.items():
        start = time.perf_counter()
        solution = solve(problem)
        yield name, time.perf_counter() - start
        if solution.certificate.relative_gap > 1e-12:
            raise SystemExit(f"{name}, table {seed}: {solution.certificate}")
    choice = solve(plain).choice
    start = time.perf_counter()
    sweep_frontier(plain, choice)
    yield "frontier", time.perf_counter() - start
    if seed < len(WIDTHS):
        start = time.perf_counter()
        keep_shares(plain, choice, partial(noisy, scores), draws=32, generator=generator)
        yield "32 resamples", time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of the allocation on 210 x 6.")
    parser.add_argument("--tables", type=int, default=24, help="random tables to time")
    times: dict[str, list[float]] = {}
    for seed in range(parser.parse_args().tables):
        for name, seconds in time_table(seed):
            times.setdefault(name, []).append(seconds)
    for name, values in times.items():
        print(f"{name:18s} median {np.median(values):6.3f} s   slowest {max(values):6.3f} s")


if __name__ == "__main__":
    main()
