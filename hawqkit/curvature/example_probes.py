"""Probes of which every example has its own, made at the outputs of layers.

`H_ll` is the sum of the examples' matrices `H^b`. One probe v for all of them has the variance of
`2 |sum_b H^b|_F^2`; probes v_b that are uncorrelated have `2 sum_b |H^b|_F^2`, which for matrices
of one sign is never more, and up to B times less where examples are alike. And the spread within
each example tells the error after a few probes, since there are B of them.

v_b is `v o r_b c_b'` elementwise, v random signs (O, I) that a probe's examples share, r_b and c_b
signs of the example alone: each v_b is a random sign matrix, and the mean of `v_b' H^b v_b` given v
is the trace, which makes examples uncorrelated. At the output of `y = W x` such a change of weights
is `r_b o v (c_b o x)`, one forward pass of the layer.

Several probes are made at once by putting as many copies of the batch into one graph.

Letters in shapes: B examples of a batch, k copies, P positions, I inputs and O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hawqkit.curvature.data import Batches
from hawqkit.curvature.layer_probes import Array, Piece, Probes, Tally, Task, inner
from hawqkit.curvature.linear_maps import LinearMap, Use, examples_of, take_examples, uses_of
from hawqkit.curvature.parameters import Parameters
from hawqkit.curvature.products.autograd import refuse_severed
from hawqkit.curvature.products.contract import Problem
from hawqkit.errors import DataError

FEWEST = 4  # probes of an example, so that its spread means something
DEGREES = 15  # of freedom of the first error bar, as of 16 probes that all data share
LARGEST = 128  # copies of a batch in one graph
BITS = 256  # of one step of the generator
# Groups of outputs that a probe may be divided into: queries, keys and values are often one weight.
PARTS = 3
WORTH_TRYING = 4  # times the products of the trial must seem needed


class ExampleProbes(Probes):
    """What probes at the outputs of layers have in common.

    Args:
        problem: what is differentiated.
        batches: the data.
        seed: of the probes.
        maps: the layers' modules, of which `apart` said that this is allowed.
        examples: of the first batch.
    """

    by_example = True

    def __init__(
        self,
        problem: Problem,
        batches: Batches,
        seed: int,
        maps: Mapping[str, LinearMap],
        examples: int,
    ) -> None:
        super().__init__(problem, batches, seed)
        self._maps = maps
        self._most: dict[int, int] = {}  # copies of the batch that begins with an example
        self.first = max(FEWEST, math.ceil(1 + DEGREES / examples))

    def _wanted(self, problem: Problem) -> Parameters:
        """No weight: the graph begins at the outputs of the layers."""
        return problem.parameters.only([])

    def _copied(
        self, problem: Problem, tasks: Sequence[Task], piece: Piece
    ) -> tuple[int, int, Any, Tensor, list[Use | None]]:
        """Return B, k, the batch k times, the outputs of the model, and each layer's use if any."""
        count = examples_of(piece.batch)
        maps = {task.layer.name: self._maps[task.layer.name] for task in tasks}
        if count is None:
            raise DataError(
                "a batch holds something without a row for each example, which the first batch did "
                "not; give batches of one form, tensors whose first axis is examples."
            )
        longest = max(task.count for task in tasks)
        if piece.example not in self._most:
            with uses_of(maps):
                self._most[piece.example] = problem.copies_at_once(piece.batch, LARGEST)
        most = min(self._most[piece.example], longest)
        # A product of k copies costs about k + 2 of one; those that a layer does not need are lost.
        copies = min(
            range(1, most + 1),
            key=lambda k: (k + 2) * sum(math.ceil(task.count / k) for task in tasks),
        )
        many = take_examples(piece.batch, torch.arange(count).repeat(copies))
        with uses_of(maps) as uses:
            z = problem.objective.outputs(problem.module, many)
        for name, found in uses.items():
            if len(found) > 1:
                raise DataError(
                    f"layer {name!r} is called {len(found)} times in a batch, but once in the "
                    "first batch; give batches of one form."
                )
        return count, copies, many, z, [found[0] if found else None for found in uses.values()]

    def _example_signs(
        self, task: Task, number: int, examples: range, width: int, like: Tensor
    ) -> Tensor:
        """Return signs (B, width), by (seed, layer, number, index of the example) alone."""
        steps = math.ceil(width / BITS)
        key = np.random.SeedSequence([self._seed, task.layer.index, task.first + number, 1])
        generator = np.random.Philox(key)
        generator.advance(examples.start * steps)
        words = generator.random_raw(len(examples) * steps * 4)
        octets = np.ascontiguousarray(words.astype("<u8")).view(np.uint8)
        bits = np.unpackbits(octets.reshape(len(examples), -1), axis=1)[:, :width]
        return torch.from_numpy(bits).to(like.device, like.dtype).mul_(2).sub_(1)


class ExampleHessianProbes(ExampleProbes):
    """sum_b v_b' H^b v_b on the graph of the gradient by the layers' outputs.

    A probe may be divided into groups of outputs, with one product a group and the sum over groups
    as its sample: blocks between groups then add nothing to the variance. In a weight of queries,
    keys and values those between queries and keys are by far the largest, and have no share in the
    trace. Whether it pays is seen by trying.
    """

    name = "hutchinson, a probe an example"

    def settle(self, layer: Tally, more: int) -> None:
        """Try a division where many probes are needed, and keep it if it needs fewer products."""
        if layer.parts == 1:
            outputs = self._maps[layer.name].outputs
            fits = outputs % PARTS == 0 and layer.drawn == layer.probes
            if fits and more > WORTH_TRYING * PARTS * self.first:
                layer.undivided, layer.passes, layer.parts = layer.passes, [], PARTS
        elif layer.undivided is not None:
            divided, passes = layer.variance, layer.passes
            layer.passes = layer.undivided
            if PARTS * divided < layer.variance:
                layer.passes = passes
            else:
                layer.passes, layer.parts = layer.undivided + passes, 1
            layer.undivided = None

    def _batch(
        self, problem: Problem, tasks: Sequence[Task], piece: Piece
    ) -> tuple[list[Array], float]:
        count, copies, many, z, uses = self._copied(problem, tasks, piece)
        total, predictions = problem.objective.loss(z, many)
        gradients = _gradients(total, uses, twice=True)
        values = [np.zeros((count, task.count)) for task in tasks]
        for samples, task, use, gradient in zip(values, tasks, uses, gradients, strict=True):
            if use is None or gradient is None or not gradient.requires_grad:
                continue  # the loss does not depend on the layer, or is linear in it
            linear = self._maps[task.layer.name]
            columns = linear.columns(use.inputs[:count])  # the copies' are the same
            shape = use.output.shape
            for numbers in task.chunks(copies):
                examples = range(piece.example, piece.example + count)
                rows = self._changes(task, numbers, linear, columns, examples)
                rest = copies * count - len(rows)
                if rest:
                    rows = torch.cat([rows, rows.new_zeros(rest, *rows.shape[1:])])
                for part in _parts(rows, task.layer.parts):
                    change = linear.output(part, shape).to(gradient.dtype)
                    (product,) = torch.autograd.grad(
                        gradient, use.output, change, retain_graph=True, allow_unused=True
                    )
                    if product is not None:
                        sums = inner(change, product).reshape(copies, count)
                        samples[:, numbers.start : numbers.stop] += sums[: len(numbers)].T
        return values, float(predictions) / copies

    def _changes(
        self, task: Task, numbers: range, linear: LinearMap, columns: Tensor, examples: range
    ) -> Tensor:
        """Return what the probes change of the layer's output rows, (k B, P, O)."""
        rows = []
        signs = task.layer.parameters.split(self._signs(task, numbers))[0]
        for number, v in zip(numbers, signs, strict=True):
            V = linear.matrix(v)
            own = self._example_signs(task, number, examples, sum(V.shape), V)
            r, c = torch.split(own[:, None], list(V.shape), -1)
            rows.append((columns * c) @ V.T * r)
        return torch.cat(rows)


class ExampleOutputProbes(ExampleProbes):
    """sum_b |J_l^b' R x_b|^2 with random signs x_b at the model's outputs, for all layers at once.

    The square of an example's gradient `sum_p d_p x_p'` is made of inner products of its positions
    where there are fewer of them than inputs.
    """

    name = "hutchinson at the outputs, a probe an example"
    twice = False
    joint = True

    def _batch(
        self, problem: Problem, tasks: Sequence[Task], piece: Piece
    ) -> tuple[list[Array], float]:
        root = problem.objective.root
        assert root is not None
        count, copies, many, z, uses = self._copied(problem, tasks, piece)
        _, predictions = problem.objective.loss(z.detach(), many)
        maps = [self._maps[task.layer.name] for task in tasks]
        squares = [
            _Squares(m.columns(u.inputs[:count])) if u is not None else None
            for m, u in zip(maps, uses, strict=True)
        ]
        values = [np.zeros((count, task.count)) for task in tasks]
        longest = max(tasks, key=lambda task: task.count)
        for numbers in longest.chunks(copies):
            x = torch.zeros_like(z)
            for place, number in enumerate(numbers):
                rows = slice(place * count, (place + 1) * count)
                x[rows] = self._output_signs(z[rows], longest.first + number, piece.example)
            with torch.no_grad():
                r = root(z.detach(), many, x)
            for samples, linear, square, d in zip(
                values, maps, squares, _gradients(z, uses, r), strict=True
            ):
                if square is not None and d is not None:
                    made = square.of(linear.rows(d), len(numbers))
                    samples[:, numbers.start : numbers.stop] = made.T
        return values, float(predictions) / copies


class _Squares:
    """Squared norms of examples' gradients, for inputs (B, P, I) that do not change."""

    def __init__(self, columns: Tensor) -> None:
        self._columns = columns
        positions, width = columns.shape[1:]
        self._gram = columns @ columns.transpose(1, 2) if positions < width else None

    def of(self, rows: Tensor, copies: int) -> Array:
        """Return of gradients at outputs (k B, P, O) the squares of the first copies, (k, B)."""
        count = len(self._columns)
        made = []
        for place in range(copies):
            D = rows[place * count : (place + 1) * count]
            if self._gram is not None:
                made.append(inner(D @ D.transpose(1, 2), self._gram))
            else:
                g = D.transpose(1, 2) @ self._columns
                made.append(inner(g, g))
        return np.stack(made)


def _gradients(
    head: Tensor, uses: Sequence[Use | None], seed: Tensor | None = None, *, twice: bool = False
) -> list[Tensor | None]:
    """Return the gradients by the layers' outputs, None where the head does not depend on one."""
    places = [i for i, use in enumerate(uses) if use is not None]
    outputs = [use.output for use in uses if use is not None]
    gradients: list[Tensor | None] = [None] * len(uses)
    if not (outputs and head.requires_grad):
        return gradients
    found = torch.autograd.grad(
        head, outputs, seed, create_graph=twice, retain_graph=True, allow_unused=True
    )
    if twice:
        refuse_severed(found, head)
    for place, gradient in zip(places, found, strict=True):
        gradients[place] = gradient
    return gradients


def _parts(rows: Tensor, count: int) -> Iterator[Tensor]:
    """Yield rows (B, P, O) with zeros outside each of some groups of outputs in turn."""
    if count == 1:
        yield rows
        return
    width = rows.shape[-1] // count
    for start in range(0, rows.shape[-1], width):
        part = torch.zeros_like(rows)
        part[..., start : start + width] = rows[..., start : start + width]
        yield part
