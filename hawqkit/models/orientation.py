"""Every kind of weight as (rows, columns) = (outputs, inputs), and back to the shape it is kept in.

    linear, embedding         (O, I)            as it is
    conv1d (transformers')    (I, O)            transposed
    convolution               (O, I/g, *k)      columns are I/g * prod(k)
    transposed-convolution    (I, O/g, *k)      row o of group j holds its I/g inputs, each with k

g groups, k kernel. A row of a convolution is all that makes one output channel, so a scale for each
row is what is called a scale per channel.
"""

from __future__ import annotations

import math
import sys

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weight_kind(module: nn.Module) -> str | None:
    """Return the kind of layer that a module is, None if its weight has no known orientation.

    >>> weight_kind(nn.Conv2d(3, 8, 3)), weight_kind(nn.LayerNorm(3))
    ('convolution', None)
    """
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, CONVOLUTIONS):
        return "convolution"
    if isinstance(module, TRANSPOSED):
        return "transposed-convolution"
    return "conv1d" if is_transposed(module) else None


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weight as (inputs, outputs): transformers' Conv1D does."""
    # A module of transformers' class can only exist once transformers has been imported.
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def as_rows(values: Tensor, module: nn.Module) -> Tensor:
    """Return a tensor of the weight's own shape as (rows, columns).

    A view wherever that is possible; a copy for transposed convolutions.

    >>> import torch
    >>> as_rows(torch.zeros(6, 4, 3, 3), nn.ConvTranspose2d(6, 8, 3, groups=2)).shape
    torch.Size([8, 27])
    """
    if is_transposed(module):
        return values.t()
    if isinstance(module, TRANSPOSED):
        g = module.groups
        split = values.reshape(g, values.shape[0] // g, values.shape[1], -1)  # (g, I/g, O/g, k)
        return split.transpose(1, 2).reshape(g * values.shape[1], -1)
    return values.reshape(values.shape[0], -1) if values.ndim > 2 else values


def from_rows(values: Tensor, module: nn.Module) -> Tensor:
    """Return (rows, columns) in the shape that the module keeps its weight in; `as_rows` undone.

    >>> import torch
    >>> net = nn.ConvTranspose1d(6, 4, 3, groups=2)
    >>> bool((from_rows(as_rows(net.weight, net), net) == net.weight).all())
    True
    """
    if is_transposed(module):
        return values.t().contiguous()
    if isinstance(module, TRANSPOSED):
        g, k = module.groups, math.prod(module.kernel_size)
        inputs, outputs = module.in_channels // g, module.out_channels // g
        split = values.reshape(g, outputs, inputs, k).transpose(1, 2)  # (g, I/g, O/g, k)
        return split.reshape(module.in_channels, outputs, *module.kernel_size)
    if isinstance(module, CONVOLUTIONS):
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        return values.reshape(shape)
    return values


def rows_and_columns(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the size of a weight of `shape` as (rows, columns).

    >>> rows_and_columns(nn.Conv2d(3, 8, 3), (8, 3, 3, 3))
    (8, 27)
    """
    if is_transposed(module):
        return shape[1], shape[0]
    if isinstance(module, TRANSPOSED):
        rows = shape[1] * module.groups
        return rows, math.prod(shape) // max(rows, 1)
    return shape[0], math.prod(shape[1:])
