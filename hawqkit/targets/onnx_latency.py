"""How long each layer takes in each format in ONNX Runtime, so that the times add up.

A layer alone misleads: in a whole graph the runtime fuses it with its neighbors, keeps blocked
layouts between convolutions, and computes in integers where the next layer quantizes what this one
returns. So two things are measured: every layer alone, once for each thing that is computed, and
the whole model in mixes of formats. The table is the one that explains the mixes best and stays
near the layers alone,

    min  sum_m ((T_m - c - sum_l t_{l, f_m(l)}) / s_m)^2
         + sum_{l,f} ((t_lf - k_f a_lf) / (k_f a_lf / 4))^2

over t >= 0 and c >= 0, with T_m the time of mix m, a_lf that of a layer alone without what any run
takes, and s_m^2 = stderr_m^2 + (0.02 T_m)^2, since times of layers do not add up exactly. One
number k_f for each format is what layers save, or lose, between neighbors: it is fitted first, to
the mixes alone, with t_lf = k_f a_lf.

Letters in shapes: M mixes, C cells (layer, format).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from hawqkit.allocation.latency import shape_key
from hawqkit.errors import InputError, Unsupported, did_you_mean
from hawqkit.formats import parse_format
from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel
from hawqkit.models.operations import with_operations
from hawqkit.models.signature import with_inputs
from hawqkit.records import Floats, LatencyTable, LayerTime
from hawqkit.targets import onnx as layout
from hawqkit.targets.contract import require
from hawqkit.targets.onnx_layers import (
    Setting,
    make_setting,
    nothing,
    operation,
    signature,
    single_layer,
)
from hawqkit.targets.onnx_timing import CLOCK, Timed, runtime_package, time_graphs

RUNTIMES = ("onnxruntime",)
LOOSENESS = 0.25  # of a layer alone: so far its time in a model may differ, relative
# Exponents of the Dirichlet distribution that shares of formats in the mixes come from, in turn:
# with the first, one or two formats prevail, with the second all shares are as likely.
CONCENTRATIONS = (0.25, 1.0)
MISFIT = 0.02  # of a whole model: so far times that add up may differ, relative


def measure_latency(
    model: LoadedModel,
    examples: Data,
    formats: Sequence[str],
    *,
    runtime: str = "onnxruntime",
    batch: int = 1,
    threads: int = 1,
    rounds: int = 15,
    mixes: int | None = None,
    near: Mapping[str, str] | None = None,
    seed: int = 0,
) -> LatencyTable:
    """Measure on this machine how long each layer takes in each format.

    See the module for what is measured and how the table is made of it. Inputs that a format
    quantizes get the range that they have in the batch, which changes no time.

    Args:
        model: a classifier that the target `onnx` can hold.
        examples: whose first `batch` examples are run.
        formats: names; `none` is float32.
        runtime: `onnxruntime`.
        batch: examples in one run.
        threads: of one operation.
        rounds: readings of each graph.
        mixes: whole models to time, beside the one of each format; None takes as many as the table
            has cells, at least 16 and at most 96.
        near: layer name -> format name, an allocation that was chosen by an earlier table: then it
            and mixes that differ from it in up to half of the layers are timed in place of mixes
            from everywhere, and the table is true around it.
        seed: of mixes and orders.

    Raises:
        HawqkitError: the packages of the extra `onnx` are missing.
        InputError: a number is too small, the runtime is unknown, or `near` has formats that are
            not measured.
        Unsupported: the target cannot hold a format, or torch cannot export the model.
    """
    _check(runtime, batch, threads, rounds, mixes, len(examples))
    names = tuple(dict.fromkeys(formats))
    fitting = {x.name: [f for f in names if parse_format(f).fits(x.columns)] for x in model.layers}
    _refuse(model, names, fitting, near)
    setting = make_setting(with_inputs(model, examples), examples, batch, threads)
    choices = {name: fitting[name] for name in setting.places}
    cells = [(name, f) for name, found in choices.items() for f in found]
    keys = _shape_keys(model, examples)
    alone = _alone(setting, cells, rounds, seed)
    count = min(96, max(16, len(cells))) if mixes is None else mixes
    drawn = _draw(choices, names, count, seed)
    if near is not None:
        drawn = _draw_near(choices, near, count, seed)
    graphs = [(setting.quantized(setting.graph, setting.places, m), setting.feed) for m in drawn]
    times, errors = time_graphs(graphs, threads=threads, rounds=rounds, seed=seed)
    fit = fit_times(cells, [alone[c] for c in cells], drawn, times, errors)
    told = {name: operation(setting, place) for name, place in setting.places.items()}
    rows = tuple(
        LayerTime(n, keys[n], f, float(t), float(e), alone[n, f], told[n])
        for (n, f), t, e in zip(cells, fit.values[1:], fit.stderr[1:], strict=True)
    )
    idle = [(n, f) for n, found in fitting.items() if n not in choices for f in found]
    rows += tuple(LayerTime(n, keys[n], f, 0.0, 0.0, 0.0, "never reached") for n, f in idle)
    version = runtime_package().__version__
    return LatencyTable(
        rows=rows,
        fixed=float(fit.values[0]),
        fixed_stderr=float(fit.stderr[0]),
        misfit=fit.misfit,
        mixes=len(drawn),
        runtime=f"{runtime} {version}",
        batch=batch,
        threads=threads,
    )


@dataclass(frozen=True, slots=True)
class Fit:
    """Times of what is in no layer, then of C cells (C + 1,), and the error of predicted mixes."""

    values: Floats
    stderr: Floats
    misfit: float


def fit_times(
    cells: Sequence[tuple[str, str]],
    alone: Sequence[float],
    mixes: Sequence[Mapping[str, str]],
    times: Floats,
    errors: Floats,
) -> Fit:
    """Return the table that explains whole models and stays near the layers alone.

    Args:
        cells: C pairs (layer, format).
        alone: (C,) milliseconds of each cell by itself.
        mixes: M assignments of formats to layers.
        times: (M,) milliseconds of the whole models.
        errors: (M,) their standard errors.

    >>> cells = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    >>> mixes = [{"a": f, "b": g} for f in "xy" for g in "xy"]
    >>> times = np.array([3 + 1 + 3, 3 + 1 + 4, 3 + 2 + 3, 3 + 2 + 4.0])
    >>> fit_times(cells, [1, 2, 3, 4], mixes, times, np.zeros(4)).values.round(3).tolist()
    [3.0, 1.0, 2.0, 3.0, 4.0]
    """
    A = np.ones((len(mixes), 1 + len(cells)))
    for row, mix in enumerate(mixes):
        A[row, 1:] = [mix.get(layer) == name for layer, name in cells]
    weights = 1 / np.sqrt(np.square(errors) + np.square(MISFIT * times))
    centers = _between_neighbors(cells, np.asarray(alone, dtype=np.float64), A, times, weights)
    near = 1 / (LOOSENESS * centers + CLOCK)
    prior = np.hstack([np.zeros((len(cells), 1)), np.diag(near)])
    design = np.vstack([A * weights[:, None], prior])
    wanted = np.concatenate([times * weights, centers * near])
    values = _solve(design, wanted)
    residual = A @ values - times
    degrees = max(1, len(mixes) - 1)
    scale = max(1.0, float(np.square(residual * weights).sum() / degrees))
    covariance = np.linalg.pinv(design.T @ design) * scale
    left_out = []
    for row in range(len(mixes)):
        kept = np.arange(len(design)) != row
        left_out.append((A[row] @ _solve(design[kept], wanted[kept]) - times[row]) / times[row])
    return Fit(values, np.sqrt(np.diag(covariance)), float(np.sqrt(np.mean(np.square(left_out)))))


def _between_neighbors(
    cells: Sequence[tuple[str, str]], alone: Floats, A: Floats, times: Floats, weights: Floats
) -> Floats:
    """Return k_f a_lf (C,), with one factor for each format and a constant fitted to the mixes."""
    formats = list(dict.fromkeys(name for _, name in cells))
    belongs = np.array([[name == f for f in formats] for _, name in cells], dtype=np.float64)
    sums = np.hstack([A[:, :1], A[:, 1:] @ (alone[:, None] * belongs)])  # (M, 1 + formats)
    factors = _solve(sums * weights[:, None], times * weights)[1:]
    centers: Floats = alone * (belongs @ factors)
    return centers


def _solve(design: Floats, wanted: Floats) -> Floats:
    found: Floats = lsq_linear(design, wanted, bounds=(0, np.inf)).x
    return found


def _check(
    runtime: str, batch: int, threads: int, rounds: int, mixes: int | None, examples: int
) -> None:
    if runtime not in RUNTIMES:
        raise InputError(
            f"unknown runtime {runtime!r}: latency is measured in {', '.join(RUNTIMES)}."
            + did_you_mean(runtime, RUNTIMES)
        )
    least = {"batch": (batch, 1), "threads": (threads, 1), "rounds": (rounds, 3)}
    if mixes is not None:
        least["mixes"] = (mixes, 2)
    bad = [f"{k} is {v}, and must be at least {m}" for k, (v, m) in least.items() if v < m]
    if batch > examples:
        bad.append(f"batch is {batch}, and there are {examples} examples")
    if bad:
        raise InputError("latency: " + "; ".join(bad) + ".")


def _refuse(
    model: LoadedModel,
    formats: Sequence[str],
    choices: Mapping[str, Sequence[str]],
    near: Mapping[str, str] | None,
) -> None:
    strange = [f"{n} in {f}" for n, f in (near or {}).items() if f not in choices.get(n, [])]
    if strange:
        raise InputError(
            f"latency near a mix: {', '.join(strange)} would not be measured; name these formats "
            "too, and give the mix of this model."
        )
    found = [f"layer {name!r}: none of the formats fits" for name, c in choices.items() if not c]
    for f in formats:
        mix = {name: f for name, fitting in choices.items() if f in fitting}
        found += layout.problems(mix, model.layers, model.facts)
    require(layout.NAME, list(dict.fromkeys(found)))


def _alone(
    setting: Setting, cells: Sequence[tuple[str, str]], rounds: int, seed: int
) -> dict[tuple[str, str], float]:
    """Return the milliseconds of each cell by itself; equal computations are timed once."""
    timed: dict[tuple[Any, ...], int] = {}
    graphs: list[Timed] = []
    keys = {}
    for name, format_name in cells:
        place = setting.places[name]
        keys[name, format_name] = key = (*signature(setting, place), format_name)
        if key not in timed:
            timed[key] = len(graphs)
            graphs.append(single_layer(setting, name, format_name))
    graphs.append(nothing())
    times, _ = time_graphs(graphs, threads=setting.threads, rounds=rounds, seed=seed)
    net = np.maximum(times - times[-1], CLOCK)
    return {cell: float(net[timed[key]]) for cell, key in keys.items()}


def _shape_keys(model: LoadedModel, examples: Data) -> dict[str, str]:
    """Return what a latency table calls each layer's shape."""
    # Where shapes vary from example to example, a shape is known by its weight alone.
    with suppress(Unsupported):
        model = with_operations(model, examples)
    return {layer.name: shape_key(layer) for layer in model.layers}


def _draw(
    choices: Mapping[str, Sequence[str]], formats: Sequence[str], count: int, seed: int
) -> list[dict[str, str]]:
    """Return mixes: one of each format, then `count` with random shares of formats.

    Among them are mixes of nearly one format, in which neighbors fuse, and evenly mixed ones, in
    which they do not.
    """
    generator = np.random.default_rng(seed)
    drawn = [{n: f if f in found else found[0] for n, found in choices.items()} for f in formats]
    for index in range(count):
        exponent = CONCENTRATIONS[index % len(CONCENTRATIONS)]
        shares = generator.dirichlet([exponent] * len(formats)) + 1e-9
        of = dict(zip(formats, shares, strict=True))
        mix = {}
        for name, found in choices.items():
            weights = np.array([of[f] for f in found])
            mix[name] = found[int(generator.choice(len(found), p=weights / weights.sum()))]
        drawn.append(mix)
    return drawn


def _draw_near(
    choices: Mapping[str, Sequence[str]], near: Mapping[str, str], count: int, seed: int
) -> list[dict[str, str]]:
    """Return a mix, and `count` in which a random share of its layers, half at most, is redrawn."""
    generator = np.random.default_rng(seed)
    drawn = [{n: near.get(n, "none" if "none" in c else c[0]) for n, c in choices.items()}]
    for _ in range(count):
        share = generator.uniform(0.0, 0.5)
        mix = dict(drawn[0])
        for name, found in choices.items():
            if generator.random() < share:
                mix[name] = found[int(generator.integers(len(found)))]
        drawn.append(mix)
    return drawn
