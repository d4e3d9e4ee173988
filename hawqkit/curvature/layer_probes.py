"""Passes over the data that add probes to layers: what is multiplied, and what a sample is.

A pass goes through the batches once, and ends in each layer's mean over its new probes and how
uncertain that is. Letters in shapes: m probes that a pass adds to a layer, u units whose samples
are independent of each other, which are examples or, where a probe is shared by all data, one.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawqkit.curvature.data import Batches, to_device
from hawqkit.curvature.fisher import Draws
from hawqkit.curvature.objective import output_curvature
from hawqkit.curvature.parameters import Parameters
from hawqkit.curvature.passes import differentiable
from hawqkit.curvature.products.autograd import gradient_graph, linear_backward, multiply
from hawqkit.curvature.products.contract import Problem
from hawqkit.distributed import processes, reduce_sum
from hawqkit.errors import DataError, NumericalError, Unsupported

Array = NDArray[np.float64]
SHARED_FIRST = 16  # probes before the first decision: with fewer the error bar itself is too rough


@dataclass(slots=True)
class Tally:
    """A layer and what its probes gave so far.

    A pass of m probes adds its mean, the variance of that mean, `sum_u s_u^2 / m`, and the sum of
    `(s_u^2 / m)^2 / (m - 1)`, of which Welch and Satterthwaite make the degrees of freedom.

    Attributes:
        name: of the layer.
        parameters: its own.
        index: among all layers of the model.
        note: for the record.
        passes: m and those three.
        drawn: probes made so far.
        products: spent so far.
        parts: into how many groups of outputs a probe is divided.
        undivided: the passes before a division was tried, until that is settled.
    """

    name: str
    parameters: Parameters
    index: int
    note: str = ""
    passes: list[tuple[int, float, float, float]] = field(default_factory=list)
    drawn: int = 0
    products: int = 0
    parts: int = 1
    undivided: list[tuple[int, float, float, float]] | None = None

    @property
    def probes(self) -> int:
        """How many the mean is over; more may have been drawn."""
        return sum(m for m, *_ in self.passes)

    @property
    def mean(self) -> float:
        """Over all probes."""
        return sum(m * mean for m, mean, *_ in self.passes) / self.probes

    @property
    def stderr(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(sum(m**2 * v for m, _, v, _ in self.passes)) / self.probes

    @property
    def variance(self) -> float:
        """Of one probe."""
        return self.stderr**2 * self.probes

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the standard error."""
        squares = sum(m**4 * q for m, *_, q in self.passes)
        return sum(m**2 * v for m, _, v, _ in self.passes) ** 2 / squares if squares else math.inf


@dataclass(frozen=True, slots=True)
class Task:
    """Probes that a pass adds to a layer, numbered from `first`."""

    layer: Tally
    first: int
    count: int

    def chunks(self, size: int) -> Iterator[range]:
        """Yield the numbers of probes, a few at a time, counted from 0."""
        for start in range(0, self.count, size):
            yield range(start, min(start + size, self.count))


@dataclass(frozen=True, slots=True)
class Piece:
    """A batch on the device of the parameters, and the index of its first example."""

    batch: Any
    example: int


class Probes(abc.ABC):
    """One way to measure layers.

    Attributes:
        name: what records call it.
        twice: whether it differentiates through attention twice.
        joint: whether all layers get the same probes, so that one count serves all.
        by_example: whether examples have probes of their own.
        first: probes before the first decision.
    """

    name = ""
    twice = True
    joint = False
    by_example = False
    first = SHARED_FIRST

    def __init__(self, problem: Problem, batches: Batches, seed: int) -> None:
        self._problem, self._batches, self._seed = problem, batches, seed

    def run(self, tasks: Sequence[Task]) -> None:
        """Add probes to layers.

        Raises:
            Unsupported: the model cannot be differentiated so.
            NumericalError: a product is not finite; the message names layer and batch.
            DataError: no prediction counts.
        """
        names = [n for task in tasks for n in task.layer.parameters.names]
        problem = self._problem.restricted(names, shared=False)
        device = problem.parameters.device
        totals = [np.zeros((1, task.count)) for task in tasks]  # for probes that batches share
        moments, counted = np.zeros((len(tasks), 3)), 0.0
        with differentiable(problem.module, self._wanted(problem), twice=self.twice):
            for number, example, batch in processes().mine(self._batches):
                piece = Piece(to_device(batch, device), example)
                values, predictions = self._guarded(problem, tasks, piece)
                refuse_infinite(values, tasks, number)
                counted += predictions
                for row, samples in enumerate(values):
                    if self.by_example:
                        moments[row] += moments_of(samples)
                    else:
                        totals[row] += samples
        if not self.by_example:
            flat = torch.from_numpy(np.concatenate(totals, 1)[0])
            flat = reduce_sum(flat.to(device)).cpu()
            parts = torch.split(flat, [task.count for task in tasks])
            moments = np.array([moments_of(part.numpy()[None]) for part in parts])
        elif processes().count > 1:
            moments = reduce_sum(torch.from_numpy(moments).to(device)).cpu().numpy()
        counted = float(reduce_sum(torch.tensor([counted], dtype=torch.float64, device=device)))
        if counted == 0:
            raise DataError("no prediction counts in any batch (all labels are ignored).")
        for task, (mean, variance, squares) in zip(tasks, moments.tolist(), strict=True):
            task.layer.drawn += task.count
            task.layer.products += task.count * task.layer.parts
            task.layer.passes.append(
                (task.count, mean / counted, variance / counted**2, squares / counted**4)
            )

    def settle(self, layer: Tally, more: int) -> None:  # noqa: B027
        """Choose how a layer that seems to need `more` probes is measured: there may be one way."""

    def _guarded(
        self, problem: Problem, tasks: Sequence[Task], piece: Piece
    ) -> tuple[list[Array], float]:
        try:
            return self._batch(problem, tasks, piece)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise _impossible(error, self.twice) from error

    @abc.abstractmethod
    def _batch(
        self, problem: Problem, tasks: Sequence[Task], piece: Piece
    ) -> tuple[list[Array], float]:
        """Return each layer's sums (u, m), and how many predictions the batch counts."""

    def _wanted(self, problem: Problem) -> Parameters:
        """Return the parameters that require a gradient."""
        return problem.parameters

    def _signs(self, task: Task, numbers: range) -> Tensor:
        """Return a layer's random signs, (n, k), by (seed, layer, number) alone.

        They are drawn again for every batch: all layers' probes together would take m times the
        model's memory.
        """
        layer, rows = task.layer, []
        for number in numbers:
            stream = np.random.SeedSequence([self._seed, layer.index, task.first + number])
            generator = torch.Generator().manual_seed(int(stream.generate_state(1)[0]))
            size = layer.parameters.size
            rows.append(torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8))
        signs = torch.stack(rows, 1).to(layer.parameters.device, layer.parameters.dtype)
        return signs.mul_(2).sub_(1)

    def _output_signs(self, z: Tensor, number: int, example: int) -> Tensor:
        """Return random signs of z's shape, by (seed, number, index of the example) alone."""
        draws = Draws((self._seed, number), example)
        rows = [draws(i, tuple(z.shape[1:]), normal=False) for i in range(z.shape[0])]
        return torch.where(torch.stack(rows) < 0.5, -1.0, 1.0).to(z.device, z.dtype)


class HessianProbes(Probes):
    """v' H_ll v on the graph of the gradient."""

    name = "hutchinson"

    def _batch(
        self, problem: Problem, tasks: Sequence[Task], piece: Piece
    ) -> tuple[list[Array], float]:
        at_once = problem.vectors_at_once(piece.batch, max(task.count for task in tasks))
        graph = gradient_graph(problem, piece.batch)
        values = [np.zeros((1, task.count)) for task in tasks]
        for samples, task in zip(values, tasks, strict=True):
            parameters = task.layer.parameters
            gradients = [graph.gradients[name] for name in parameters.names]
            for numbers in task.chunks(at_once):
                v = parameters.split(self._signs(task, numbers))
                Hv, _ = multiply(gradients, list(parameters.tensors), v)
                for a, b in zip(v, Hv, strict=True):
                    if b is not None:
                        samples[0, numbers.start : numbers.stop] += inner(a, b)
        return values, graph.count


class OutputProbes(Probes):
    """|J_l' R x|^2 with random signs x, for all layers at once: first derivatives alone."""

    name = "hutchinson at the outputs"
    twice = False
    joint = True

    def _batch(
        self, problem: Problem, tasks: Sequence[Task], piece: Piece
    ) -> tuple[list[Array], float]:
        root = problem.objective.root
        assert root is not None
        z = problem.objective.outputs(problem.module, piece.batch)
        _, predictions = problem.objective.loss(z.detach(), piece.batch)
        values = [np.zeros((1, task.count)) for task in tasks]
        longest = max(tasks, key=lambda task: task.count)
        for numbers in longest.chunks(problem.vectors_at_once(piece.batch, longest.count)):
            signs = [self._output_signs(z, longest.first + n, piece.example) for n in numbers]
            with torch.no_grad():
                r = torch.stack([root(z.detach(), piece.batch, x) for x in signs])
            gradients, _ = multiply([z], list(problem.parameters.tensors), [r])
            by_name = dict(zip(problem.parameters.names, gradients, strict=True))
            for samples, task in zip(values, tasks, strict=True):
                for name in task.layer.parameters.names:
                    if (g := by_name[name]) is not None:
                        samples[0, numbers.start : numbers.stop] += inner(g, g)
        return values, float(predictions)


class JacobianProbes(Probes):
    """v' J_l' L_zz J_l v, where no root of L_zz is known."""

    name = "hutchinson"

    def _batch(
        self, problem: Problem, tasks: Sequence[Task], piece: Piece
    ) -> tuple[list[Array], float]:
        z = problem.objective.outputs(problem.module, piece.batch)
        _, predictions = problem.objective.loss(z.detach(), piece.batch)
        values = [np.zeros((1, task.count)) for task in tasks]
        at_once = problem.vectors_at_once(piece.batch, max(task.count for task in tasks))
        backward = linear_backward(z, problem.parameters.tensors)
        if backward is None:
            return values, float(predictions)
        u, gradients = backward
        by_name = dict(zip(problem.parameters.names, gradients, strict=True))
        for samples, task in zip(values, tasks, strict=True):
            own = [by_name[name] for name in task.layer.parameters.names]
            for numbers in task.chunks(at_once):
                v = task.layer.parameters.split(self._signs(task, numbers))
                (JV,), _ = multiply(own, [u], v)
                if JV is not None:
                    MJV = output_curvature(problem.objective, z.detach(), piece.batch, JV)
                    samples[0, numbers.start : numbers.stop] = inner(JV, MJV)
        return values, float(predictions)


def inner(a: Tensor, b: Tensor) -> Array:
    """Return the inner products of k pairs, (k,), in float64."""
    wide = torch.promote_types(a.dtype, torch.float32)
    products = (a.detach().to(wide) * b.detach().to(wide)).flatten(1).sum(1)
    return np.asarray(products.to("cpu", torch.float64).numpy())


def moments_of(samples: Array) -> Array:
    """Return of samples (u, m) the sum of means, of their variances, and of `variance^2 / (m-1)`.

    Units are independent, so variances of their means add up.
    """
    m = samples.shape[1]
    variances = samples.var(1, ddof=1) / m
    return np.array([samples.mean(1).sum(), variances.sum(), (variances**2).sum() / (m - 1)])


def refuse_infinite(values: Sequence[Array], tasks: Sequence[Task], number: int) -> None:
    """Refuse a batch's sums if one of them is not finite."""
    for samples, task in zip(values, tasks, strict=True):
        if not np.isfinite(samples).all():
            raise NumericalError(
                f"a product for layer {task.layer.name!r} holds NaN or infinity in batch {number} "
                "(counted from 0). Operators whose value is finite can have infinite derivatives; "
                "so can half precision that overflows: try float32, or leave that batch or layer "
                "out."
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
