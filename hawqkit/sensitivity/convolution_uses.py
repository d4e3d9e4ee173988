"""Uses of convolutions: their gradients by unfolding, one matrix product an example and group.

A convolution is a linear layer on patches: with p_t the patch of the input that makes output pixel
t, `y_t = W p_t`, and the gradient of an example is `sum_t d_t p_t'`. A transposed convolution is
the adjoint: every input pixel x_t writes `W' x_t` into a patch of the output, so its gradient is
the sum of the products of x_t with that patch of the output gradients.

Letters: B examples, T pixels (of the output, for a transposed convolution of the input), g groups,
O and I channels, K entries of a row: I/g times the kernel's k; R rows at once, n groups among them,
F formats, s sampled positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hawqkit.models.orientation import TRANSPOSED
from hawqkit.sensitivity.positions import Positions
from hawqkit.sensitivity.uses import Use, wide

# Entries of the patches that are cut at once: 1 MB of float32, within a core's own cache.
PATCH_ENTRIES = 1 << 18


def convolution_use(module: nn.Module, inputs: Tensor, gradients: Tensor) -> Use:
    """Return the use of a convolution of either kind.

    Args:
        module: the layer.
        inputs: (B, I, ...) what it was given.
        gradients: (B, O, ...) at its output.
    """
    kind = TransposedUse if isinstance(module, TRANSPOSED) else ConvolutionUse
    return kind(module, inputs, gradients)


class _GroupedUse(Use):
    """What the two kinds share: rows are output channels, in g groups that see other inputs."""

    def __init__(self, module: nn.Module, inputs: Tensor, gradients: Tensor) -> None:
        self._module = cast(Any, module)  # kernel_size, stride and the like are typed as tensors
        self._inputs, self.gradients = inputs, gradients
        self._groups = int(self._module.groups)
        self.rows_together = gradients.shape[1] // self._groups
        self._kept: tuple[Positions, Tensor] | None = None  # patches at the sampled positions

    def rows(self, total: int) -> Tensor | None:
        """Every row is touched."""
        return None

    def _span(self, rows: Tensor | slice) -> slice:
        """Return the groups that rows lie in: one, or several whole ones."""
        assert isinstance(rows, slice), "a convolution's rows come in slices"
        return slice(rows.start // self.rows_together, -(-rows.stop // self.rows_together))


class ConvolutionUse(_GroupedUse):
    """A convolution in one to three dimensions.

    Patches are cut with the channels innermost, so that whole runs of memory are copied; gradients
    and errors have their columns in that order, (k, I/g), within this file.
    """

    @property
    def length(self) -> int:
        """Pixels of the output."""
        return math.prod(self.gradients.shape[2:])

    def arrange(self, errors: Tensor) -> Tensor:
        """Return errors (F, R, K) with the columns in the order of the patches."""
        inputs = self._inputs.shape[1] // self._groups
        if inputs in (1, errors.shape[2]):
            return errors
        return errors.reshape(*errors.shape[:2], inputs, -1).transpose(2, 3).flatten(2)

    @cached_property
    def _d(self) -> Tensor:
        return wide(self.gradients.flatten(2))  # (B, O, T)

    @cached_property
    def _windows(self) -> Tensor:
        """A view of the inputs of every output pixel, (B, g, *pixels, *kernel, I/g)."""
        m = self._module
        x = wide(self._inputs)
        if any(m._reversed_padding_repeated_twice):
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            x = pad(x, m._reversed_padding_repeated_twice, mode=mode)
        x = x.movedim(1, -1).contiguous()  # (B, ..., I)
        inputs = x.shape[-1] // self._groups
        steps = x.stride()[1:-1]
        inside = [s * d for s, d in zip(steps, m.dilation, strict=True)]
        across = [s * d for s, d in zip(steps, m.stride, strict=True)]
        shape = (len(x), self._groups, *self.gradients.shape[2:], *m.kernel_size, inputs)
        return x.as_strided(shape, (x.stride(0), inputs, *across, *inside, 1))

    @property
    def _columns(self) -> int:
        return math.prod(self._windows.shape[2 + len(self._module.kernel_size) :])

    def gradient(self, rows: Tensor | slice, some: slice) -> Tensor:
        """Return sum_t d_t p_t', (b, R, K)."""
        windows = self._windows[some, self._span(rows)]
        b, n = windows.shape[:2]
        d = self._d[some, rows].reshape(b, n, -1, self.length)  # (b, n, R/n, T)
        out = d.new_empty(*d.shape[:3], self._columns)
        on_cpu = windows.device.type == "cpu"
        each = max(1, PATCH_ENTRIES // max(1, windows[0].numel())) if on_cpu else b
        for start in range(0, b, each):
            part = slice(start, start + each)
            patches = windows[part].reshape(-1, n, self.length, self._columns)
            torch.matmul(d[part], patches, out=out[part])
        return out.flatten(1, 2)

    def norms(self, positions: Positions) -> Tensor:
        """Return sum over groups of |d_t|^2 |p_t|^2, (B, s)."""
        d = _at(self._d, positions).square()  # (B, O, s)
        d = d.reshape(len(d), self._groups, -1, d.shape[-1]).sum(2)  # (B, g, s)
        return (d * self._sampled(slice(None), positions).square().sum(3)).sum(1)

    def responses(
        self, rows: Tensor | slice, errors: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """One product of (F R, K) with (K, B s) a group, then a sum over rows."""
        formats, count, columns = errors.shape
        patches = self._sampled(self._span(rows), positions)  # (B, n, s, K)
        n = patches.shape[1]
        a = patches.transpose(0, 1).reshape(n, -1, columns).transpose(1, 2)  # (n, K, B s)
        y = errors.reshape(formats, n, count // n, columns) @ a  # (F, n, R/n, B s)
        d = _at(self._d[:, rows], positions).permute(1, 0, 2)  # (R, B, s)
        y = y.view(formats, count, *positions.index.shape).mul_(d)
        return y.square().sum(1).permute(1, 2, 0), y.sum(1).permute(1, 2, 0)

    def _sampled(self, span: slice, positions: Positions) -> Tensor:
        """Return patches at the sampled positions, (B, n, s, K)."""
        if self._kept is None or self._kept[0] is not positions:
            pixels = torch.unravel_index(positions.index, self.gradients.shape[2:])
            example = torch.arange(len(positions.index), device=positions.index.device)[:, None]
            part = self._windows.movedim(1, -1)[(example, *pixels)]  # (B, s, *kernel, I/g, g)
            self._kept = positions, part.movedim(-1, 1).flatten(3)
        return self._kept[1][:, span]


class TransposedUse(_GroupedUse):
    """A transposed convolution in one to three dimensions."""

    @property
    def length(self) -> int:
        """Pixels of the input."""
        return math.prod(self._inputs.shape[2:])

    @cached_property
    def _x(self) -> Tensor:
        return wide(self._inputs).reshape(
            len(self._inputs), self._groups, -1, self.length
        )  # (B, g, I/g, T)

    @cached_property
    def _patches(self) -> Tensor:
        """The output gradients that every input pixel reaches, (B, g, O/g, k, T)."""
        m = self._module
        padding = [p for side in reversed(m.padding) for p in (side, side)]
        d = pad(wide(self.gradients), padding)
        cut = _windows(d, m.kernel_size, m.stride, m.dilation, self._inputs.shape[2:])
        return cut.reshape(len(d), self._groups, self.rows_together, -1, self.length)

    def gradient(self, rows: Tensor | slice, some: slice) -> Tensor:
        """Return sum_t patch_t x_t', (b, R, K)."""
        d, span = self._taken(rows)
        d = d[some]
        made = d.flatten(2, 3) @ self._x[some, span].transpose(2, 3)  # (b, n, R/n k, I/g)
        made = made.view(*d.shape[:4], -1).transpose(3, 4)  # (b, n, R/n, I/g, k)
        return made.flatten(3).flatten(1, 2)

    def norms(self, positions: Positions) -> Tensor:
        """Return sum over groups of |patch_t|^2 |x_t|^2, (B, s)."""
        d = _at(self._patches, positions).square().sum((2, 3))  # (B, g, s)
        return (d * _at(self._x, positions).square().sum(2)).sum(1)

    def responses(
        self, rows: Tensor | slice, errors: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Write dW' x_t into the patch of every sampled input pixel, and weigh it by d there."""
        formats = len(errors)
        d, span = self._taken(rows, positions)  # (B, n, R/n, k, s)
        x = _at(self._x[:, span], positions)  # (B, n, I/g, s)
        n, inputs = x.shape[1:3]
        split = errors.reshape(formats, n, d.shape[2], inputs, -1).transpose(3, 4)
        a = x.permute(1, 2, 0, 3).reshape(n, inputs, -1)  # (n, I/g, B s)
        y = split.flatten(2, 3) @ a  # (F, n, R/n k, B s)
        y = y.reshape(formats, -1, *positions.index.shape)  # (F, R k, B, s)
        y = y.mul_(d.flatten(1, 3).permute(1, 0, 2))
        return y.square().sum(1).permute(1, 2, 0), y.sum(1).permute(1, 2, 0)

    def _taken(
        self, rows: Tensor | slice, positions: Positions | None = None
    ) -> tuple[Tensor, slice]:
        """Return the patches of some rows, (B, n, R/n, k, T or s), and their groups."""
        span = self._span(rows)
        assert isinstance(rows, slice)
        part = self._patches[:, span]
        if span.stop - span.start == 1:
            start = rows.start - span.start * self.rows_together
            part = part[:, :, start : start + rows.stop - rows.start]
        return (part if positions is None else _at(part, positions)), span


def _windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    out: Sequence[int],
) -> Tensor:
    """Return a view of x (B, C, ...) as (B, C, *kernel, *out): entry (k, t) is x[t stride + k]."""
    x = x.contiguous()
    steps = x.stride()[2:]
    inside = [s * d for s, d in zip(steps, dilation, strict=True)]
    across = [s * d for s, d in zip(steps, stride, strict=True)]
    return x.as_strided((*x.shape[:2], *kernel, *out), (*x.stride()[:2], *inside, *across))


def _at(values: Tensor, positions: Positions) -> Tensor:
    """Return values (B, ..., T) at the sampled positions, (B, ..., s)."""
    shape = (*values.shape[:-1], positions.index.shape[1])
    index = positions.index.view(len(values), *[1] * (values.ndim - 2), -1)
    return values.gather(-1, index.expand(shape))
