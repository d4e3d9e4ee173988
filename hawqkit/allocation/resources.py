"""What a mix takes of a budget, counted in integers: bits, bytes, bit operations, latency.

Letters in shapes: L layers, F formats, G groups of layers that share a format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from hawqkit.errors import BudgetError, InputError, Unsupported
from hawqkit.formats import Format, parse_format
from hawqkit.records import Integers, Layer

ExactSize = Callable[[Mapping[str, str]], int]
Amounts = Sequence[Sequence[Fraction | None]]

BOPS = "bops"
LATENCY = "latency_ms"
BITS = ("average_bits", "bits_per_weight")
BUDGETS = (*BITS, "size", BOPS, LATENCY)
UNITS = {"bytes": "bytes", BOPS: "BOPs", LATENCY: "ms"}
PICOSECONDS = 10**9  # in a millisecond

# Sums up to here are exact in the solver's float64, and a limit beyond it limits nothing.
MOST_EXACT = 10**15
UNLIMITED = 2**62
_MOST_DIGITS = 18
_MOST_NAMES = 8


@dataclass(frozen=True, slots=True, eq=False)
class SizeTable:
    """Bytes of the files that one target writes, as a sum over layers.

    Attributes:
        target: name of the target.
        costs: (L, F) bytes that layer l takes in format f; cells that do not exist are not read.
        fixed: bytes that no choice changes.
        exact: bytes of all files for one whole mix (layer name -> format name); headers make it
            differ a little from `fixed` plus the sum of `costs`.
    """

    target: str
    costs: Integers
    fixed: int
    exact: ExactSize


@dataclass(frozen=True, slots=True, eq=False)
class CostTable:
    """What each layer takes of one budget in each format, of whatever kind.

    Attributes:
        name: of the budget that limits it: `bops`, `latency_ms`, or any other.
        costs: (L, F) integers >= 0; cells that do not exist are not read.
        scale: integers in one unit of the figure that is asked for, a power of ten.
        unit: of that figure, for messages.
        fixed: what no choice changes, an integer too.
    """

    name: str
    costs: Integers
    scale: int = 1
    unit: str = ""
    fixed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Resource:
    """One budget in integers: fixed + sum over groups of costs[g, choice[g]] must be <= limit.

    Attributes:
        name: `average_bits`, `bits_per_weight`, `size`, `bops`, `latency_ms`, or that of a table.
        costs: (G, F), 0 where the format is not allowed.
        fixed: what no choice changes.
        limit: the largest integer within what was asked.
        unit: `bits`, `bytes`, `BOPs`, `ms` or none.
        scale: what to divide an integer by to get the user's figure: entries of all layers for
            `bits`, else a power of ten.
        asked: the limit as it came.
        exact: true bytes of a whole mix, for `size`.
    """

    name: str
    costs: Integers
    fixed: int
    limit: int
    unit: str
    scale: int = 1
    asked: float = math.inf
    exact: ExactSize | None = None

    def used(self, choice: Integers) -> int:
        """Return what a choice (G,) takes by the additive table, in integers."""
        return self.fixed + int(self.costs[np.arange(choice.size), choice].sum())

    def figure(self, amount: int) -> str:
        """Write an integer amount in the user's unit, rounded up so that it can be asked for."""
        if self.unit == "bits":
            return f"{math.ceil(Fraction(amount, self.scale) * 10_000) / 10_000:g}"
        return f"{_decimal(amount, self.scale)} {self.unit}".rstrip()

    def limit_figure(self) -> str:
        """Write the limit as it was asked for."""
        if self.unit == "bits":
            return f"{self.asked:g}"
        if self.unit == "bytes" and self.scale == 1:
            return self.figure(self.limit)
        return f"{self.asked:,.12g} {self.unit}".rstrip()

    def step(self, amount: int) -> str:
        """Write a difference of two amounts."""
        return f"{amount} bits" if self.unit == "bits" else self.figure(amount)


def _decimal(amount: int, scale: int) -> str:
    """Write amount / scale in full; the scale is a power of ten."""
    whole, rest = divmod(amount, scale)
    digits = f"{rest:0{len(str(scale)) - 1}d}".rstrip("0") if rest else ""
    return f"{whole:,}" + (f".{digits}" if digits else "")


def read_limit(name: str, asked: float) -> Fraction:
    """Return a limit as the exact number that its shortest decimal writes.

    Raises:
        BudgetError: it is no finite number above 0.
    """
    try:
        limit = Fraction(asked) if isinstance(asked, int) else Fraction(str(float(asked)))
    except (TypeError, ValueError):
        limit = Fraction(0)
    if limit <= 0:
        raise BudgetError(f"budget {name} = {asked!r}: a limit must be a finite number above 0.")
    return limit


def whole_limit(limit: Fraction, scale: int) -> int:
    """Return the largest integer amount within a limit; one that limits nothing stays an int64."""
    return min(math.floor(limit * scale), UNLIMITED)


def cost_table(layers: Sequence[Layer], formats: Sequence[str], name: str) -> Integers:
    """Return the (L, F) bits that `average_bits` or `bits_per_weight` counts; 0 where none fits.

    Raises:
        InputError: `name` is neither of the two.
    """
    if name not in BITS:
        raise InputError(f"unknown bit count {name!r}: known are {', '.join(BITS)}.")
    table = np.zeros((len(layers), len(formats)), dtype=np.int64)
    for column, form in enumerate(map(parse_format, formats)):
        for row, layer in enumerate(layers):
            if not form.fits(layer.columns):
                continue
            if name == "average_bits":
                table[row, column] = layer.numel * form.code_bits(layer.dtype_bits)
            else:
                table[row, column] = form.total_bits(layer.rows, layer.columns, layer.dtype_bits)
    return table


def bit_operations(layer: Layer, form: Format) -> int:
    """Return the bit operations of a layer for one example.

        BOPs = macs x bits of a weight x bits of an activation

    (Yao et al. 2021, HAWQ-V3, section 4; biases and scales are left out). Activations that the
    format does not quantize count as they are stored, and so do the weights of `none`.

    >>> layer = Layer("conv", "convolution", 64, 576, "float32", macs=1_000_000)
    >>> bit_operations(layer, parse_format("int4-channel"))
    128000000

    Args:
        layer: with counted `macs`.
        form: the format of its weights, and of its inputs where it has `activation_bits`.
    """
    stored = layer.dtype_bits
    activations = stored if form.activation_bits is None else form.activation_bits
    return layer.macs * form.code_bits(stored) * activations


def uncounted(layers: Sequence[Layer]) -> list[str]:
    """Return the names of layers whose multiply-accumulates are not known.

    An embedding is looked up and multiplies nothing: its 0 is a count, as long as any other layer
    was counted.
    """
    counted = any(layer.macs > 0 for layer in layers)
    return [x.name for x in layers if x.macs < 1 and not (counted and x.kind == "embedding")]


def bops_table(layers: Sequence[Layer], formats: Sequence[str]) -> CostTable:
    """Return the bit operations of every layer in every format; see `bit_operations`.

    Raises:
        Unsupported: multiply-accumulates of a layer were not counted; names all such layers.
    """
    unknown = uncounted(layers)
    if unknown:
        more = f" and {len(unknown) - _MOST_NAMES} more" if len(unknown) > _MOST_NAMES else ""
        raise Unsupported(
            f"budget {BOPS}: bit operations are multiply-accumulates x weight bits x activation "
            f"bits, and the multiply-accumulates of {len(unknown)} of {len(layers)} layers are not "
            f"known ({', '.join(unknown[:_MOST_NAMES])}{more}): they were never counted on real "
            "inputs, or the inputs do not reach these layers. Probe with this budget in the "
            "recipe (in Python: with_operations(model, data) before probe), exclude layers that "
            "take no part, or set another budget."
        )
    forms = [parse_format(name) for name in formats]
    costs = [[bit_operations(layer, form) for form in forms] for layer in layers]
    _refuse_sums(BOPS, sum(max(row) for row in costs))
    return CostTable(BOPS, np.array(costs, dtype=np.int64), 1, UNITS[BOPS])


def exact_costs(name: str, amounts: Amounts) -> CostTable:
    """Return amounts as integers: times the least power of ten that makes all of them whole.

    It stays so small that the largest mix takes at most 10^15; digits beyond that are rounded up,
    so that a budget that is kept in integers is kept.

    >>> quarter, two = Fraction("0.25"), Fraction(2)
    >>> table = exact_costs("latency_ms", [[quarter, None], [Fraction("1.5"), two]])
    >>> table.costs.tolist(), table.scale
    ([[25, 0], [150, 200]], 100)

    Args:
        name: of the budget.
        amounts: (L, F) numbers >= 0; None where a cell does not exist.

    Raises:
        InputError: the sums are beyond 64-bit integers.
    """
    known = [amount for row in amounts for amount in row if amount is not None]
    most = sum(max((a for a in row if a is not None), default=Fraction(0)) for row in amounts)
    _refuse_sums(name, most)
    wanted = max((_digits(amount) for amount in known), default=0)
    digits = next(k for k in range(wanted, -1, -1) if k == 0 or most * 10**k <= MOST_EXACT)
    scale = 10**digits
    costs = np.zeros((len(amounts), len(amounts[0]) if amounts else 0), dtype=np.int64)
    for row, cells in enumerate(amounts):
        for column, amount in enumerate(cells):
            costs[row, column] = 0 if amount is None else math.ceil(amount * scale)
    return CostTable(name, costs, scale, UNITS.get(name, ""))


def _digits(amount: Fraction) -> int:
    """Return the decimals that a number needs, at most 18."""
    return next((k for k in range(_MOST_DIGITS) if amount * 10**k % 1 == 0), _MOST_DIGITS)


def _refuse_sums(name: str, most: Fraction | int) -> None:
    if most >= UNLIMITED:
        raise InputError(
            f"the {name} of all layers come to {float(most):.3g}, beyond what 64-bit integers hold "
            "(4.6e18): count them in a larger unit."
        )
