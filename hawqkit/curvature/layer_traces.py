"""Traces of all layers' blocks, from one graph a batch.

`v' H_ll v` has the expectation tr(H_ll) for random signs v (Hutchinson 1990). Each layer has probes
of its own: one probe over all layers at once is unbiased too, but the blocks between layers enter
its variance, which then was 22 to 180 times larger.

For the Gauss-Newton matrix the probes are random signs x at the outputs, where a root R of the
output curvature L_zz = R R' is known: `E |J_l' R x|^2 = n tr(G_ll)`, for all layers at once. Drawn
labels would serve too, but where the network is sure of itself the trace comes from rare labels: a
few draws agree on a value that is far too small, and their standard error with them.

Letters in shapes: m probes of a pass.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from hawqkit.curvature.data import Batches, to_device
from hawqkit.curvature.fisher import Draws
from hawqkit.curvature.layers import Chosen, check_kind, choose_layers
from hawqkit.curvature.objective import Objective, output_curvature
from hawqkit.curvature.of_model import refuse_unknown
from hawqkit.curvature.parameters import Parameters, choose_parameters
from hawqkit.curvature.passes import differentiable, refuse_training_mode
from hawqkit.curvature.products.autograd import gradient_graph, linear_backward, multiply
from hawqkit.curvature.products.contract import Problem
from hawqkit.distributed import processes, reduce_sum
from hawqkit.errors import DataError, InputError, NumericalError, Unsupported
from hawqkit.models.model import LoadedModel
from hawqkit.records.spectral import Estimate

FIRST = 16  # probes before the first decision: fewer make the standard error itself too uncertain
LARGEST = 128  # probes of one pass
CONFIDENCE = 0.95


@dataclass(slots=True)
class _Layer:
    """One layer's probes so far."""

    name: str
    parameters: Parameters
    index: int
    samples: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def stderr(self) -> float:
        return float(np.std(self.samples, ddof=1) / math.sqrt(len(self.samples)))


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

    A probe stays the same over all batches of a pass, so the standard error is that of the probes
    alone: the data is what it is. Layers stop one by one; a layer's probes are the same whichever
    other layers are measured.

    Args:
        model: a network in eval mode.
        objective: the loss.
        batches: as for `hessian`.
        layers: see `choose_layers`.
        relative_error: a layer stops when its standard error is this share of its value's
            magnitude.
        max_probes: it stops here at the latest, and its note says so.
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
    problem, open_layers = _prepare(model, objective, layers, memory_bytes)
    done: dict[str, Estimate] = {}
    method = _METHODS[kind] if objective.root or kind == "hessian" else _JacobianProbes
    measured = method(problem, Batches(batches), seed)
    order = [layer.name for layer in open_layers]
    while open_layers:
        count = _next(open_layers, relative_error, max_probes)
        measured.run(open_layers, count)
        for layer in open_layers:
            if layer.stderr <= relative_error * abs(float(np.mean(layer.samples))):
                done[layer.name] = _estimate(layer, measured.name)
            elif len(layer.samples) >= max_probes:
                layer.note = (
                    f"stopped at max_probes = {max_probes}, above the relative error asked for"
                )
                done[layer.name] = _estimate(layer, measured.name)
        open_layers = [layer for layer in open_layers if layer.name not in done]
    return {name: done[name] for name in order}


def _prepare(
    model: nn.Module | LoadedModel, objective: Objective, layers: Chosen, memory_bytes: int | None
) -> tuple[Problem, list[_Layer]]:
    module = refuse_unknown(model)
    refuse_training_mode(module)
    groups = choose_layers(model, layers)
    every = choose_parameters(module, [n for names in groups.values() for n in names])
    problem = Problem(module, objective, every, memory_bytes=memory_bytes)
    known = choose_layers(model) if not isinstance(layers, dict) else groups
    place = {name: i for i, name in enumerate(known)}
    return problem, [_Layer(name, every.only(names), place[name]) for name, names in groups.items()]


def _next(layers: Sequence[_Layer], relative_error: float, max_probes: int) -> int:
    """Return how many probes the next pass makes: what the neediest layer seems to need."""
    have = len(layers[0].samples)
    if have == 0:
        return min(FIRST, max_probes)
    shares = [s.stderr / max(abs(float(np.mean(s.samples))), 1e-300) for s in layers]
    needed = have * (min(max(shares), 1e3) / relative_error) ** 2
    # Less than is needed by the present guess, since half of the layers guess too high.
    return int(min(max(needed / 2 - have, FIRST / 2), LARGEST, max_probes - have))


def _estimate(layer: _Layer, method: str) -> Estimate:
    count = len(layer.samples)
    value, stderr = float(np.mean(layer.samples)), layer.stderr
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * stderr
    return Estimate(
        value=value,
        stderr=stderr,
        samples=count,
        products=count,
        method=method,
        interval=(value - half, value + half),
        note=layer.note,
    )


class _Probes(abc.ABC):
    """Walks through the batches with all open layers' probes, and adds up what they give."""

    name = ""
    twice = True

    def __init__(self, problem: Problem, batches: Batches, seed: int) -> None:
        self._problem, self._batches, self._seed = problem, batches, seed

    def run(self, layers: Sequence[_Layer], count: int) -> None:
        """Add `count` samples to each layer."""
        names = [n for layer in layers for n in layer.parameters.names]
        problem = self._problem.restricted(names, shared=False)
        first = len(layers[0].samples)
        device = problem.parameters.device
        totals = torch.zeros(len(layers), count, dtype=torch.float64)
        counted = 0.0
        with differentiable(problem.module, problem.parameters, twice=self.twice):
            for number, example, batch in processes().mine(self._batches):
                try:
                    values, predictions = self._batch(
                        problem, layers, first, count, example, to_device(batch, device)
                    )
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, NotImplementedError) as error:
                    raise _impossible(error, self.twice) from error
                _refuse(values, layers, number)
                totals += values
                counted += predictions
        totals = reduce_sum(totals.to(device)).cpu()
        counted = float(reduce_sum(torch.tensor([counted], dtype=torch.float64, device=device)))
        if counted == 0:
            raise DataError("no prediction counts in any batch (all labels are ignored).")
        for layer, row in zip(layers, (totals / counted).tolist(), strict=True):
            layer.samples.extend(row)

    @abc.abstractmethod
    def _batch(
        self,
        problem: Problem,
        layers: Sequence[_Layer],
        first: int,
        count: int,
        example: int,
        batch: Any,
    ) -> tuple[Tensor, float]:
        """Return each layer's sums (L, m), and how many predictions the batch counts."""

    def _signs(
        self, layer: _Layer, first: int, count: int, at_once: int
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield a layer's probes, `at_once` at a time: (place of the first, (k, *shape)).

        A probe depends on (seed, layer, its number) alone. They are drawn again for every batch:
        all layers' probes together would take m times the model's memory.
        """
        for start in range(0, count, at_once):
            rows = []
            for number in range(first + start, first + min(start + at_once, count)):
                stream = np.random.SeedSequence([self._seed, layer.index, number])
                generator = torch.Generator().manual_seed(int(stream.generate_state(1)[0]))
                bits = torch.randint(
                    0, 2, (layer.parameters.size,), generator=generator, dtype=torch.int8
                )
                rows.append(bits)
            signs = torch.stack(rows, 1).to(layer.parameters.device, layer.parameters.dtype)
            yield start, layer.parameters.split(2 * signs - 1)


class _HessianProbes(_Probes):
    """v' H_ll v on the graph of the gradient."""

    name = "hutchinson"

    def _batch(
        self,
        problem: Problem,
        layers: Sequence[_Layer],
        first: int,
        count: int,
        example: int,
        batch: Any,
    ) -> tuple[Tensor, float]:
        at_once = problem.vectors_at_once(batch, count)
        graph = gradient_graph(problem, batch)
        values = torch.zeros(len(layers), count, dtype=torch.float64)
        for row, layer in enumerate(layers):
            gradients = [graph.gradients[name] for name in layer.parameters.names]
            for start, v in self._signs(layer, first, count, at_once):
                Hv, _ = multiply(gradients, list(layer.parameters.tensors), v)
                for a, b in zip(v, Hv, strict=True):
                    if b is not None:
                        values[row, start : start + len(a)] += _inner(a, b)
        return values, graph.count


class _OutputProbes(_Probes):
    """|J_l' R x|^2 with random signs x, for all layers at once: first derivatives alone."""

    name = "hutchinson at the outputs"
    twice = False

    def _batch(
        self,
        problem: Problem,
        layers: Sequence[_Layer],
        first: int,
        count: int,
        example: int,
        batch: Any,
    ) -> tuple[Tensor, float]:
        root = problem.objective.root
        assert root is not None
        z = problem.objective.outputs(problem.module, batch)
        _, predictions = problem.objective.loss(z.detach(), batch)
        values = torch.zeros(len(layers), count, dtype=torch.float64)
        at_once = problem.vectors_at_once(batch, count)
        for start in range(0, count, at_once):
            numbers = range(first + start, first + min(start + at_once, count))
            with torch.no_grad():
                r = torch.stack(
                    [root(z.detach(), batch, self._output_signs(z, n, example)) for n in numbers]
                )
            gradients, _ = multiply([z], list(problem.parameters.tensors), [r])
            by_name = dict(zip(problem.parameters.names, gradients, strict=True))
            for row, layer in enumerate(layers):
                for name in layer.parameters.names:
                    if (g := by_name[name]) is not None:
                        values[row, start : start + len(r)] += _inner(g, g)
        return values, float(predictions)

    def _output_signs(self, z: Tensor, number: int, example: int) -> Tensor:
        """Return random signs of z's shape, by (seed, number, index of the example) alone."""
        draws = Draws((self._seed, number), example)
        rows = [draws(i, tuple(z.shape[1:]), normal=False) for i in range(z.shape[0])]
        return torch.where(torch.stack(rows) < 0.5, -1.0, 1.0).to(z.device, z.dtype)


class _JacobianProbes(_Probes):
    """v' J_l' L_zz J_l v, where no root of L_zz is known."""

    name = "hutchinson"

    def _batch(
        self,
        problem: Problem,
        layers: Sequence[_Layer],
        first: int,
        count: int,
        example: int,
        batch: Any,
    ) -> tuple[Tensor, float]:
        z = problem.objective.outputs(problem.module, batch)
        _, predictions = problem.objective.loss(z.detach(), batch)
        values = torch.zeros(len(layers), count, dtype=torch.float64)
        at_once = problem.vectors_at_once(batch, count)
        backward = linear_backward(z, problem.parameters.tensors)
        if backward is None:
            return values, float(predictions)
        u, gradients = backward
        by_name = dict(zip(problem.parameters.names, gradients, strict=True))
        for row, layer in enumerate(layers):
            own = [by_name[name] for name in layer.parameters.names]
            for start, v in self._signs(layer, first, count, at_once):
                (JV,), _ = multiply(own, [u], v)
                if JV is not None:
                    MJV = output_curvature(problem.objective, z.detach(), batch, JV)
                    values[row, start : start + v[0].shape[0]] = _inner(JV, MJV)
        return values, float(predictions)


_METHODS: dict[str, type[_Probes]] = {"hessian": _HessianProbes, "gauss-newton": _OutputProbes}


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of k pairs, (k,), in float64 on the CPU."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.detach().to(wide) * b.detach().to(wide)).flatten(1).sum(1).to("cpu", torch.float64)


def _refuse(values: Tensor, layers: Sequence[_Layer], number: int) -> None:
    if bool(torch.isfinite(values).all()):
        return
    row = int((~torch.isfinite(values)).any(1).nonzero()[0, 0])
    raise NumericalError(
        f"a product for layer {layers[row].name!r} holds NaN or infinity in batch {number} "
        "(counted from 0). Operators whose value is finite can have infinite derivatives; so can "
        "half precision that overflows: try float32, or leave that batch or layer out."
    )


def _impossible(error: Exception, twice: bool) -> Unsupported:
    hint = (
        " If the model cannot be differentiated twice, use kind='gauss-newton', which needs first "
        "derivatives alone, or the trace of hessian(..., products='difference').block(...)."
    )
    return Unsupported(
        f"traces of layers could not be made: {str(error).splitlines()[0][:160]}."
        + (hint if twice else "")
    )
