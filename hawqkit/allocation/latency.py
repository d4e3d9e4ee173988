"""How long each layer takes in each format, from a table that was measured on some machine.

    layer,shape,format,milliseconds
    (fixed),,,0.12
    conv1,,int8-channel,0.36
    ,convolution:64x576@115605504,int8-channel,0.21

Every row names a layer or a shape (see `shape_key`); a row that names both is the layer's, and
where rows of both fit, that of the layer holds. The layer `(fixed)` is what no format changes. A
mix is taken to need the sum of its layers' times and that. Other columns are for people.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from hawqkit.allocation.csv_files import CsvFile, read_csv
from hawqkit.allocation.resources import LATENCY, PICOSECONDS, UNITS, CostTable
from hawqkit.errors import InputError
from hawqkit.formats import parse_format
from hawqkit.records import Layer

REQUIRED = ("format", "milliseconds")
KEYS = ("layer", "shape")
FIXED = "(fixed)"
_MOST_NAMES = 4


def shape_key(layer: Layer) -> str:
    """Return what the rows of a latency table call a layer's shape.

        kind:ROWSxCOLUMNS          where operations were not counted
        kind:ROWSxCOLUMNS@MACS     where they were

    Two convolutions with equal weights take different times on images of different sizes, which
    their multiply-accumulates for one example tell apart.

    >>> shape_key(Layer("conv", "convolution", 64, 576, "float32", macs=115605504))
    'convolution:64x576@115605504'
    >>> shape_key(Layer("up_proj", "linear", 1536, 576, "bfloat16"))
    'linear:1536x576'
    """
    size = f"{layer.kind}:{layer.rows}x{layer.columns}"
    return f"{size}@{layer.macs}" if layer.macs else size


@dataclass(frozen=True, slots=True, eq=False)
class LatencyFile:
    """Rows of a latency table.

    Attributes:
        source: the file, as it was named.
        layers: (layer, format) -> picoseconds, rounded up.
        shapes: (shape, format) -> picoseconds, rounded up.
        fixed: picoseconds of what is in no layer.
    """

    source: str
    layers: dict[tuple[str, str], int]
    shapes: dict[tuple[str, str], int]
    fixed: int = 0

    def picoseconds(self, layer: Layer, format_name: str) -> int | None:
        """Return how long a layer takes in a format; None if the table has no row for it."""
        found = self.layers.get((layer.name, format_name))
        return self.shapes.get((shape_key(layer), format_name)) if found is None else found

    def costs(self, layers: Sequence[Layer], formats: Sequence[str]) -> CostTable:
        """Return the (L, F) picoseconds of all formats that fit, 0 elsewhere.

        Raises:
            InputError: the table has no row for some; lists all that are missing.
        """
        table = np.zeros((len(layers), len(formats)), dtype=np.int64)
        missing: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for row, layer in enumerate(layers):
            absent = []
            for column, name in enumerate(formats):
                if not parse_format(name).fits(layer.columns):
                    continue
                found = self.picoseconds(layer, name)
                if found is None:
                    absent.append(name)
                else:
                    table[row, column] = found
            if absent:
                missing.setdefault((shape_key(layer), tuple(absent)), []).append(layer.name)
        if missing:
            raise InputError(self._lacking(missing, layers))
        return CostTable(LATENCY, table, PICOSECONDS, UNITS[LATENCY], self.fixed)

    def _lacking(
        self, missing: dict[tuple[str, tuple[str, ...]], list[str]], layers: Sequence[Layer]
    ) -> str:
        count = sum(len(formats) * len(names) for (_, formats), names in missing.items())
        rows = "; ".join(
            f"{', '.join(names)} (shape {shape}) in {', '.join(formats)}"
            for (shape, formats), names in missing.items()
        )
        known = {layer.name for layer in layers}
        strangers = list(dict.fromkeys(name for name, _ in self.layers if name not in known))
        more = f" and {len(strangers) - _MOST_NAMES} more" if len(strangers) > _MOST_NAMES else ""
        hint = (
            f" It names layers that are not measured here: {', '.join(strangers[:_MOST_NAMES])}"
            f"{more}."
            if strangers
            else ""
        )
        return (
            f"{self.source}: {count} row{'s' if count > 1 else ''} missing: {rows}. Add them, each "
            f"by its layer or by its shape, or leave out these layers or formats.{hint}"
        )


def read_latencies(path: str | Path) -> LatencyFile:
    """Read a latency table, and refuse everything that is wrong with it at once.

    Args:
        path: a CSV file with the columns `format`, `milliseconds`, and `layer`, `shape` or both.

    Raises:
        TableError: the file cannot be read, a column is missing, a cell is empty or no number of at
            least 0, or a row stands twice; each with its line.
    """
    file = read_csv(path)
    file.require(REQUIRED)
    if not set(KEYS) & set(file.columns):
        file.complain(
            1,
            "line 1: there is no column 'layer' or 'shape', which says what a row is about; the "
            f"header has {', '.join(file.columns)}.",
        )
    found: dict[str, dict[tuple[str, str], int]] = {key: {} for key in KEYS}
    lines: dict[tuple[str, str, str], int] = {}
    for row in file.rows:
        fixed = row.cells.get("layer") == FIXED
        format_name = "" if fixed else file.text(row, "format")
        amount = file.number(row, "milliseconds")
        key = next((key for key in KEYS if row.cells.get(key)), None)
        if key is None:
            if set(KEYS) & set(file.columns):
                file.complain(row.line, f"line {row.line}: names neither a layer nor a shape.")
            continue
        name = row.cells[key]
        first = lines.setdefault((key, name, format_name), row.line)
        if (format_name or fixed) and first != row.line:
            what = f"{key} {name!r}" + (f" in format {format_name!r}" if format_name else "")
            file.complain(
                row.line,
                f"line {row.line}: {what} stands on line {first} already; keep one of them.",
            )
        found[key][name, format_name] = _picoseconds(file, row.line, amount)
    file.refuse()
    fixed_time = found["layer"].pop((FIXED, ""), 0)
    return LatencyFile(file.source, found["layer"], found["shape"], fixed_time)


def _picoseconds(file: CsvFile, line: int, amount: Fraction | None) -> int:
    picoseconds = 0 if amount is None else math.ceil(amount * PICOSECONDS)
    if picoseconds >= 2**53:
        file.complain(line, f"line {line}: milliseconds is beyond {2**53 // PICOSECONDS:,}.")
        return 0
    return picoseconds
