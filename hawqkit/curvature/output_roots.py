"""A root R of the second derivative of any loss by the outputs: `R R' = L_zz`.

With x of random signs `J' R x` has the covariance `J' L_zz J`, so one backward pass a draw is
unbiased for the Gauss-Newton matrix. Where an objective names no root of its own, the symmetric one
is made from dense blocks of L_zz. What a block is - one number, one prediction, one example - is
not assumed but seen: blocks are kept if they give the product with a random vector, too.

Letters: B examples, N output numbers of each, w numbers of a block, m blocks of an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hawqkit.curvature.linear_maps import take_examples
from hawqkit.curvature.objective import Objective, output_curvature
from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.models.examples import ExampleBatch

LARGEST_BLOCK = 1024  # numbers of a block: a decomposition then takes about a second
BLOCK_ENTRIES = 1 << 24  # of all blocks that are made at once, 128 MB
EXAMPLE_ENTRIES = 1 << 27  # of the blocks of one example, 1 GB
UNIT_ENTRIES = 1 << 22  # of the vectors that are multiplied at once
# Eigenvalues below zero by less than this share of the largest one are rounding and count as zero,
# which changes no product by more.
NEGATIVE = 1e-5
# What blocks leave out of a random vector's product, at most, relative: far above the rounding of a
# product, and far below what couples any two numbers noticeably.
LEFT_OUT = 1e-3
# Machine epsilons that count as zero in both: p - p^2 of a sure prediction is the difference of two
# numbers near one, and nothing of it may be left.
EPSILONS = 64

Product = Callable[[Tensor], Tensor]


def output_root(objective: Objective, z: Tensor, batch: Any, X: Tensor) -> Tensor:
    """Return R X with `R R' = L_zz`, the second derivative of the loss sum by the outputs.

    The objective's own `root` is used if it has one. Else L_zz is made from `curvature`, or from
    `loss` differentiated twice, as blocks along the diagonal: of single numbers if these do not
    depend on each other (then R is the square root of each), else of predictions (the last axis of
    z), else of examples, with at most 1024 numbers in a block; R is the symmetric root of each
    block by its eigenvalues. All in float64 where the loss can be computed in it.

    Args:
        objective: the loss.
        z: outputs (B, ...); the result is a constant.
        batch: whose loss; the first axis of its tensors is examples.
        X: of z's shape.

    Raises:
        InputError: `root` or `curvature` returns another shape, or examples depend on each other.
        NumericalError: the result is not finite.
        Unsupported: L_zz is not positive semi-definite, its blocks are too large, or the loss
            cannot be differentiated twice.

    >>> half_square = Objective(lambda m, b: b, lambda z, b: ((z**2).sum() / 2, len(z)))
    >>> output_root(half_square, torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2, 1)).tolist()
    [[1.0], [1.0]]
    """
    if objective.root is not None:
        with torch.no_grad():
            made = objective.root(z.detach(), batch, X)
        if made.shape != z.shape:
            raise InputError(
                f"{objective.name}: root returned the shape {tuple(made.shape)} for outputs and "
                f"signs of shape {tuple(z.shape)}; it must return R X in the shape of the outputs."
            )
    else:
        step = max(1, BLOCK_ENTRIES // (z[0].numel() * max(_widths(z))))
        parts = []
        for rows in torch.split(torch.arange(len(z)), step):
            some = take_examples(batch, rows)
            at = rows.to(z.device)
            parts.append(_derived(objective, z.detach()[at], some, X[at]))
        made = torch.cat(parts)
    if not bool(torch.isfinite(made).all()):
        raise NumericalError(
            f"{objective.name}: the second derivative by the outputs holds NaN or infinity; check "
            "outputs and targets, and what the loss does where it is not smooth."
        )
    return made.to(z.dtype)


def _derived(objective: Objective, z: Tensor, batch: Any, X: Tensor) -> Tensor:
    """Return R X with the symmetric root of the smallest blocks that are the whole of L_zz."""
    z, times = _product(objective, z, batch)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    wanted = times(v[None])[0].reshape(len(z), -1)  # (B, N)
    if not bool(torch.isfinite(wanted).all()):
        return torch.full_like(z, math.nan)
    numbers = wanted.shape[1]
    zero = EPSILONS * torch.finfo(z.dtype).eps
    allowed = LEFT_OUT * wanted.norm(dim=1) + zero * v.reshape(len(z), -1).norm(dim=1)
    for width in _widths(z):
        blocks = _blocks(times, z, width)  # (B, m, w, w)
        parts = v.reshape(*blocks.shape[:-1], 1).to(blocks)
        found = (blocks @ parts).reshape(len(z), -1)
        if bool((found - wanted).norm(dim=1).le(allowed).all()):
            root = _root(objective.name, blocks)
            return (root @ X.reshape(parts.shape).to(root)).reshape(z.shape)
    if numbers in _widths(z):
        raise InputError(
            f"{objective.name}: the loss of one example depends on the outputs of another, so no "
            "example can be measured by itself; the loss must be a sum over examples."
        )
    raise Unsupported(
        f"{objective.name}: the outputs of an example, {numbers:,} numbers, depend on each other "
        f"in the second derivative in blocks larger than {max(_widths(z)):,}, and no root is made "
        f"of blocks of more than {LARGEST_BLOCK:,}, or {EXAMPLE_ENTRIES:,} entries an example. "
        "Move what depends on each other to the last axis in Objective(outputs=...), or give "
        "Objective(root=...)."
    )


def _widths(z: Tensor) -> list[int]:
    """Return how many numbers a block may have, ascending: one, a prediction's, an example's."""
    numbers = z[0].numel()
    widths = sorted({1, z.shape[-1] if z.ndim > 1 else 1, numbers})
    return [w for w in widths if w <= LARGEST_BLOCK and (w == 1 or w * numbers <= EXAMPLE_ENTRIES)]


def in_float64(objective: Objective, z: Tensor, batch: Any) -> tuple[Tensor, Any]:
    """Return outputs and batch in float64, if the loss can be computed in it.

    A loss that holds tensors of its own, class weights for instance, may refuse to be mixed with
    it; then outputs are at least float32, and the batch is what came.

    Args:
        objective: the loss.
        z: outputs; the result is a constant.
        batch: whose loss; floating targets of `Examples` get the dtype of the outputs.
    """
    z = z.detach()
    wide, some = z.double(), batch
    if isinstance(batch, ExampleBatch) and batch.labels.is_floating_point():
        some = replace(batch, labels=batch.labels.double())
    try:
        with torch.no_grad():
            objective.loss(wide, some)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # "expected scalar type", by the operator
        return z.to(torch.promote_types(z.dtype, torch.float32)), batch
    return wide, some


def _product(objective: Objective, z: Tensor, batch: Any) -> tuple[Tensor, Product]:
    """Return outputs and U -> L_zz U, in float64 where that can be."""
    z, batch = in_float64(objective, z, batch)
    try:
        output_curvature(objective, z, batch, torch.ones_like(z)[None])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Unsupported(
            f"{objective.name}: the second derivative by the outputs cannot be computed ({error}); "
            "give Objective(curvature=...) or Objective(root=...)."
        ) from error
    return z, lambda U: _shaped(objective, z, batch, U)


def _shaped(objective: Objective, z: Tensor, batch: Any, U: Tensor) -> Tensor:
    made = output_curvature(objective, z, batch, U)
    if made.shape != U.shape:
        raise InputError(
            f"{objective.name}: curvature returned the shape {tuple(made.shape)} for vectors of "
            f"shape {tuple(U.shape)}; it must return one product for each, in their shape."
        )
    return made.detach().to(z.dtype)


def _blocks(times: Product, z: Tensor, width: int) -> Tensor:
    """Return the blocks of `width` numbers along the diagonal of L_zz, (B, m, w, w)."""
    shape = (len(z), z[0].numel() // width, width)
    columns = []
    step = max(1, UNIT_ENTRIES // max(z.numel(), 1))
    for numbers in torch.split(torch.arange(width), step):
        units = z.new_zeros(len(numbers), *shape)
        for place, number in enumerate(numbers.tolist()):
            units[place, ..., number] = 1.0
        columns.append(times(units.reshape(len(numbers), *z.shape)).reshape(-1, *shape))
    return torch.cat(columns).movedim(0, -1)


def _root(name: str, blocks: Tensor) -> Tensor:
    """Return the symmetric root of each block (..., w, w).

    Raises:
        Unsupported: a block has a negative eigenvalue.
    """
    if blocks.shape[-1] == 1:
        values, vectors = blocks[..., 0], torch.ones_like(blocks)
    else:
        values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    largest, least = float(values.abs().max()), float(values.min())
    zero = NEGATIVE * largest + EPSILONS * torch.finfo(blocks.dtype).eps
    if least < -zero:
        share = float((values.amin(-1) < -zero).double().mean())
        raise Unsupported(
            f"{name}: its second derivative by the outputs is not positive semi-definite: "
            f"{100 * share:.3g} % of its blocks have a negative eigenvalue, down to {least:.3g} "
            f"beside {largest:.3g}. Then there is no root and no Gauss-Newton matrix to draw from. "
            "Give Objective(root=...) of a convex stand-in, for instance of the expectation of the "
            "second derivative over labels that the model predicts."
        )
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
