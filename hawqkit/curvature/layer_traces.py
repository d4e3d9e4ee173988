"""Traces of all layers' blocks, from one graph a batch.

`v' H_ll v` has the expectation tr(H_ll) for random signs v (Hutchinson 1990). Each layer has probes
of its own: one probe over all layers at once is unbiased too, but the blocks between layers enter
its variance, which then was 22 to 180 times larger. Where examples do not meet in the network each
example has probes of its own too, which needs fewer of them (`example_probes`).

For the Gauss-Newton matrix the probes are random signs x at the outputs, where a root R of the
output curvature L_zz = R R' is known: `E |J_l' R x|^2 = n tr(G_ll)`, for all layers at once. Drawn
labels would serve too, but where the network is sure of itself the trace comes from rare labels: a
few draws agree on a value that is far too small, and their standard error with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from scipy import stats
from torch import nn

from hawqkit.curvature.data import Batches, to_device
from hawqkit.curvature.example_probes import (
    ExampleHessianProbes,
    ExampleOutputProbes,
    ExampleProbes,
)
from hawqkit.curvature.layer_probes import (
    HessianProbes,
    JacobianProbes,
    OutputProbes,
    Probes,
    Tally,
    Task,
)
from hawqkit.curvature.layers import Chosen, check_kind, choose_layers
from hawqkit.curvature.linear_maps import apart, examples_of, linear_maps
from hawqkit.curvature.objective import Objective
from hawqkit.curvature.of_model import refuse_unknown
from hawqkit.curvature.parameters import choose_parameters
from hawqkit.curvature.passes import refuse_training_mode
from hawqkit.curvature.products.contract import Problem
from hawqkit.errors import InputError
from hawqkit.models.model import LoadedModel
from hawqkit.records.spectral import Estimate

LARGEST = 128  # probes of one pass
GROWTH = 4  # by which a pass may multiply the probes: what an early error bar asks for is rough
CONFIDENCE = 0.95


def layer_traces(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    layers: Chosen = None,
    relative_error: float = 0.05,
    max_probes: int = 1024,
    seed: int = 0,
    kind: str = "hessian",
    memory_bytes: int | None = None,
) -> dict[str, Estimate]:
    """Return every layer's trace with its standard error, `{layer: tr(H_ll)}`.

    Standard errors are those of the probes alone: the data is what it is. Layers stop one by one; a
    layer's probes are the same whichever other layers are measured. `method` says whether each
    example had probes of its own: the layer must be the weight of one `nn.Linear`, `nn.Conv1d`,
    `nn.Conv2d` or GPT-2 `Conv1D` that is called once, whose outputs for one example do not depend
    on another, which is looked at on the first batch.

    Args:
        model: a network in eval mode.
        objective: the loss.
        batches: as for `hessian`.
        layers: see `choose_layers`.
        relative_error: a layer stops when its standard error is this share of its value's
            magnitude.
        max_probes: it stops here at the latest, and its note says so. A probe that is divided into
            parts of the outputs takes three products; `products` counts them.
        seed: of the probes.
        kind: `hessian` or `gauss-newton`.
        memory_bytes: what the probes of a pass may take together; None is half of the free memory.

    Returns:
        estimates with Student t intervals of 95 %; `samples` probes, each over the whole data.
        Because probes are added until the error looks small enough, the interval covers a little
        less.

    Raises:
        InputError: a layer is unknown, or an option is out of range.
        Unsupported: the model is in training mode, or cannot be differentiated twice.
        NumericalError: a product is not finite; the message names layer and batch.
    """
    check_kind(kind)
    if not relative_error > 0:
        raise InputError(f"relative_error: got {relative_error}; it must be above 0.")
    if max_probes < 2:
        raise InputError(f"max_probes: got {max_probes}; an error bar needs 2 or more.")
    problem, layers_in_order = _prepare(model, objective, layers, memory_bytes)
    data = Batches(batches)
    done: dict[str, Estimate] = {}
    for measured, open_layers in _methods(problem, data, layers_in_order, kind, seed):
        while open_layers:
            tasks = _tasks(measured, open_layers, relative_error, max_probes)
            if tasks:
                measured.run(tasks)
            for layer in open_layers:
                if layer.stderr <= relative_error * abs(layer.mean):
                    done[layer.name] = _estimate(layer, measured.name)
                elif layer.probes >= max_probes:
                    layer.note = (
                        f"stopped at max_probes = {max_probes}, above the relative error asked for"
                    )
                    done[layer.name] = _estimate(layer, measured.name)
            open_layers = [layer for layer in open_layers if layer.name not in done]
    return {layer.name: done[layer.name] for layer in layers_in_order}


def _prepare(
    model: nn.Module | LoadedModel, objective: Objective, layers: Chosen, memory_bytes: int | None
) -> tuple[Problem, list[Tally]]:
    module = refuse_unknown(model)
    refuse_training_mode(module)
    groups = choose_layers(model, layers)
    chosen = [module.get_parameter(n) for names in groups.values() for n in names]
    every = choose_parameters(module, chosen)
    problem = Problem(module, objective, every, memory_bytes=memory_bytes)
    known = choose_layers(model) if not isinstance(layers, dict) else groups
    place = {name: i for i, name in enumerate(known)}
    return problem, [Tally(name, every.only(names), place[name]) for name, names in groups.items()]


def _methods(
    problem: Problem, batches: Batches, layers: Sequence[Tally], kind: str, seed: int
) -> list[tuple[Probes, list[Tally]]]:
    """Return who measures which layers: with probes of examples where that is allowed."""
    root = problem.objective.root is not None
    if kind == "gauss-newton" and not root:
        return [(JacobianProbes(problem, batches, seed), list(layers))]
    first = to_device(batches.first(), problem.parameters.device)
    maps = linear_maps(problem.module, {t.name: t.parameters.names for t in layers})
    maps = apart(problem, maps, first)
    apart_from = [layer for layer in layers if layer.name in maps]
    others = [layer for layer in layers if layer.name not in maps]
    by_example: type[ExampleProbes] = ExampleHessianProbes
    shared: type[Probes] = HessianProbes
    if kind == "gauss-newton":
        by_example, shared = ExampleOutputProbes, OutputProbes
    found: list[tuple[Probes, list[Tally]]] = []
    if apart_from:
        examples = examples_of(first) or 1
        found.append((by_example(problem, batches, seed, maps, examples), apart_from))
    if others:
        found.append((shared(problem, batches, seed), others))
    return found


def _tasks(
    measured: Probes, layers: Sequence[Tally], relative_error: float, max_probes: int
) -> list[Task]:
    """Return how many probes the next pass adds to each layer: what it seems to need."""
    for layer in layers:
        measured.settle(layer, _needed(layer, relative_error) - layer.probes)
    counts = [_more(layer, measured.first, relative_error, max_probes) for layer in layers]
    if measured.joint:
        counts = [max(counts)] * len(counts)
    # Settling a division may have taken its probes in, and a layer has all that it may have.
    pairs = zip(layers, counts, strict=True)
    return [Task(layer, layer.drawn, n) for layer, n in pairs if n > 0]


def _needed(layer: Tally, relative_error: float) -> int:
    """Return how many probes reach the relative error, by the present error bar."""
    if not layer.probes:
        return 0
    share = min(layer.stderr / max(abs(layer.mean), 1e-300), 1e3)
    return int(layer.probes * (share / relative_error) ** 2) + 1


def _more(layer: Tally, first: int, relative_error: float, max_probes: int) -> int:
    have, more = layer.probes, first
    if have:
        more = min(_needed(layer, relative_error) - have, (GROWTH - 1) * have, LARGEST)
    # Two at least, and never one left over: the spread of one probe is not known.
    more = min(max(more, 2), max_probes - have)
    return more + 1 if max_probes - have - more == 1 else more


def _estimate(layer: Tally, method: str) -> Estimate:
    value, stderr = layer.mean, layer.stderr
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, max(layer.degrees, 1.0)))
    return Estimate(
        value=value,
        stderr=stderr,
        samples=layer.probes,
        products=layer.products,
        method=method,
        interval=(value - quantile * stderr, value + quantile * stderr),
        note=layer.note,
    )
