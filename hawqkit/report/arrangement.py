"""How the layers of a model are laid out in a picture: kind by block, or plain strips.

A transformer repeats one block, so its layers form a grid: a row for each kind of layer (`q_proj`,
`down_proj`), a column for each block. A model without such a pattern is cut into strips of equal
length, in the model's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hawqkit.records import Layer
from hawqkit.report.wording import clean, shorten

MOST_KINDS = 40  # more rows than this are no longer a picture
LEAST_FILLED = 0.5  # a grid with more holes than layers misleads
STRIP = 30


@dataclass(frozen=True, slots=True)
class Strip:
    """One row of layers.

    Attributes:
        label: what the row holds.
        cells: index of a layer in the model's order, or None for a hole.
    """

    label: str
    cells: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """All layers, each exactly once.

    Attributes:
        strips: rows of equal length.
        blocks: True if a column is a block of the model.
        outside: strips at the end whose layers lie in no block; their columns are no blocks.
    """

    strips: tuple[Strip, ...]
    blocks: bool
    outside: int = 0

    @property
    def columns(self) -> int:
        """Length of the rows."""
        return len(self.strips[0].cells)


def arrange(layers: Sequence[Layer]) -> Arrangement:
    """Lay out layers as kind x block where they form such a grid, else as strips."""
    return _grid(layers) or _plain(layers)


def kind_of(layer: Layer) -> str:
    """Return what a layer is called inside of its block: its name after the block's number.

    >>> kind_of(Layer("model.layers.3.self_attn.q_proj", "linear", 4, 4, "float32", block=3))
    'self_attn.q_proj'
    """
    if layer.block is None:
        return layer.name
    return layer.name.partition(f".{layer.block}.")[2] or layer.name


def short_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """Return kind -> its last part, or more of it where last parts are not unique.

    >>> short_kinds(["attn.c_attn", "attn.c_proj", "mlp.c_proj"])
    {'attn.c_attn': 'c_attn', 'attn.c_proj': 'attn.c_proj', 'mlp.c_proj': 'mlp.c_proj'}
    >>> short_kinds(["conv1", "downsample.0"])
    {'conv1': 'conv1', 'downsample.0': 'downsample.0'}
    """
    leaves = [_leaf(kind) for kind in kinds]
    return {
        kind: shorten(leaf if leaves.count(leaf) == 1 else kind, 24)
        for kind, leaf in zip(kinds, leaves, strict=True)
    }


def _leaf(name: str) -> str:
    """Return the last part of a name, with the part before it where it is a mere number."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _grid(layers: Sequence[Layer]) -> Arrangement | None:
    inside = [(i, layer) for i, layer in enumerate(layers) if layer.block is not None]
    kinds = list(dict.fromkeys(kind_of(layer) for _, layer in inside))
    blocks = sorted({layer.block for _, layer in inside if layer.block is not None})
    if len(blocks) < 2 or len(kinds) > MOST_KINDS:
        return None
    width = blocks[-1] + 1
    cells: dict[tuple[str, int], int] = {}
    for index, layer in inside:
        cells.setdefault((kind_of(layer), layer.block or 0), index)
    if len(cells) < max(len(inside), LEAST_FILLED * len(kinds) * width):
        return None
    names = short_kinds(kinds)
    strips = [Strip(names[k], tuple(cells.get((k, b)) for b in range(width))) for k in kinds]
    outside = [i for i, layer in enumerate(layers) if layer.block is None]
    rows = 0
    for index in outside if len(outside) <= MOST_KINDS // 2 else ():
        leaf = clean(layers[index].name.rpartition(".")[2])
        apart = " (outside)" if leaf in names.values() else ""
        strips.append(Strip(shorten(leaf, 24) + apart, (index, *[None] * (width - 1))))
        rows += 1
    if rows < len(outside):
        chunks = _chunks(outside, width)
        strips.extend(Strip("outside of blocks", chunk) for chunk in chunks)
        rows = len(chunks)
    return Arrangement(tuple(strips), True, rows)


def _plain(layers: Sequence[Layer]) -> Arrangement:
    width = min(max(STRIP, math.ceil(len(layers) / MOST_KINDS)), len(layers))
    strips = [
        Strip(_range_label(chunk), chunk) for chunk in _chunks(list(range(len(layers))), width)
    ]
    return Arrangement(tuple(strips), False)


def _chunks(indices: Sequence[int], width: int) -> list[tuple[int | None, ...]]:
    rows = [list(indices[start : start + width]) for start in range(0, len(indices), width)]
    return [(*row, *[None] * (width - len(row))) for row in rows]


def _range_label(chunk: Sequence[int | None]) -> str:
    real = [index for index in chunk if index is not None]
    return f"layer {real[0]}" if len(real) == 1 else f"layers {real[0]}–{real[-1]}"
