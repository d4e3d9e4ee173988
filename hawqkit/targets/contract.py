"""What every target offers: the functions of a module, held to these types by a test.

Letters in shapes: L layers, F formats. A mix maps layer names to format names; a layer that it does
not name stays as it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hawqkit.errors import InputError, Unsupported, did_you_mean
from hawqkit.formats import INTEGER, Format, fitting_formats, format_names, parse_format
from hawqkit.records import Allocation, Integers, Layer, ModelFacts

if TYPE_CHECKING:
    from hawqkit.models.model import LoadedModel


ALL_KINDS = ("linear", "conv1d", "embedding", "convolution", "transposed-convolution")
MOST_PROBLEMS = 10  # that a message lists: a wrong target has one for each layer


@dataclass(frozen=True, slots=True)
class IntegerFormats:
    """Integer formats that a target can hold: every combination of what is listed.

    Attributes:
        bits: widths of a code.
        groups: columns that share a scale; None is the whole row (`channel`).
        symmetric: True for formats without a zero point, False for those with one.
        activations: bits of a layer's inputs; None where they stay as they are.
    """

    bits: tuple[int, ...]
    groups: tuple[int | None, ...] = (32, 64, 128, None)
    symmetric: tuple[bool, ...] = (True,)
    activations: tuple[int | None, ...] = (None,)

    def hold(self, format: Format) -> bool:
        """Whether a format is one of them.

        >>> IntegerFormats((4, 8)).hold(parse_format("int4-g64"))
        True
        >>> IntegerFormats((4, 8)).hold(parse_format("int4-g64-asym"))
        False
        """
        return (
            format.family == INTEGER
            and format.bits in self.bits
            and format.group_size in self.groups
            and format.symmetric in self.symmetric
            and format.activation_bits in self.activations
        )


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a target can hold, as data: `hawqkit targets` prints it, `problems_of` checks it.

    Attributes:
        integers: sets of integer formats; a format of any of them can be held.
        names: formats of other families, by name.
        kinds: kinds of layers that can be quantized.
        tied: whether a weight with several uses can be quantized.
        mixed: False if all quantized layers must have one format.
        rows_multiple: what the rows of a quantized layer must be a multiple of.
        columns_multiple: the same of its columns.
        dynamic_inputs: whether rounded inputs are rounded token by token and symmetrically,
            whatever ranges were measured.
        shares: the runtime whose fused layers must share a format whatever reads the result; None
            where only the runtime of the allocation decides.
    """

    integers: tuple[IntegerFormats, ...] = ()
    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("linear",)
    tied: bool = False
    mixed: bool = True
    rows_multiple: int = 1
    columns_multiple: int = 1
    dynamic_inputs: bool = False
    shares: str | None = None

    def hold(self, format: Format) -> bool:
        """Whether the target can hold a format at all; `none` always."""
        if not format.quantizes or format.name in self.names:
            return True
        return any(integers.hold(format) for integers in self.integers)

    def formats(self) -> tuple[str, ...]:
        """Return the names of all formats of weights that can be held, `none` last.

        >>> Capabilities((IntegerFormats((4,), (None,)),), names=("nf4-g64",)).formats()
        ('int4-channel', 'nf4-g64', 'none')
        """
        return tuple(name for name in format_names() if self.hold(parse_format(name)))

    def activations(self) -> tuple[int, ...]:
        """Return the bits that inputs of layers can have, fewest first."""
        found = {bits for integers in self.integers for bits in integers.activations}
        return tuple(sorted(bits for bits in found if bits is not None))


class Target(Protocol):
    """A module that writes a mix in the form that one quantizer or runtime reads.

    Attributes:
        NAME: the name in a recipe.
        ABOUT: one sentence for tables.
        RUNTIMES: names of the runtimes that read the layout.
        SIZED: whether the files hold the weights: then their bytes are worth a budget, and only
            `write` can write them.
    """

    NAME: str
    ABOUT: str
    RUNTIMES: tuple[str, ...]
    SIZED: bool

    def capabilities(self) -> Capabilities:
        """Return what the target can hold, whatever the model."""

    def problems(
        self, mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
    ) -> list[str]:
        """Return everything that the target cannot hold, each with the layer and what would fit."""

    def size_table(
        self, layers: Sequence[Layer], formats: Sequence[str], facts: ModelFacts
    ) -> tuple[Integers, int]:
        """Return bytes (L, F) of each choice, and the bytes that no choice changes.

        `fixed + sum of costs` is near `size`, which alone is exact: headers do not add up. A cell
        whose format does not fit its layer is 0.

        Raises:
            Unsupported: the target has no sizes.
        """

    def size(self, mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> int:
        """Return the bytes of all files that `write` writes for this mix, equal to the byte.

        Raises:
            Unsupported: the target has no sizes, or cannot hold the mix.
        """

    def write_from_facts(
        self, allocation: Allocation, folder: Path, layers: Sequence[Layer], facts: ModelFacts
    ) -> list[Path]:
        """Write the same as `write`, where the model is not loaded; without torch.

        Raises:
            Unsupported: the files hold weights, or the target cannot hold the mix.
            InputError: the folder holds something else; nothing is changed.
        """

    def write(self, allocation: Allocation, folder: Path, model: LoadedModel) -> list[Path]:
        """Write the allocation, and return the files.

        The folder appears at once or not at all. One that an earlier export wrote is replaced.

        Raises:
            Unsupported: the target cannot hold the mix; nothing is written.
            InputError: the folder holds something else; nothing is changed.
        """


def require(name: str, problems: Sequence[str]) -> None:
    """Refuse a mix that a target cannot hold, with every problem at once.

    Raises:
        Unsupported: there are problems.
    """
    if not problems:
        return
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    lines = capped(problems)
    raise Unsupported("\n".join([f"target {name!r} cannot hold this mix: {count}", *lines]))


def capped(problems: Sequence[str], most: int = MOST_PROBLEMS) -> list[str]:
    """Return the first problems as lines of a list, and how many more there are.

    >>> capped(["a", "b", "c"], most=2)
    ['  - a', '  - b', '  and 1 more']
    """
    more = len(problems) - most
    return [*(f"  - {p}" for p in problems[:most]), *([f"  and {more} more"] if more > 0 else [])]


def mix_problems(mix: Mapping[str, str], layers: Sequence[Layer]) -> list[str]:
    """Return what is wrong with a mix whatever the target: unknown names, misfit formats."""
    known = {layer.name: layer for layer in layers}
    found = (choice_problem(name, format_name, known) for name, format_name in mix.items())
    return [problem for problem in found if problem is not None]


def choice_problem(name: str, format_name: str, known: Mapping[str, Layer]) -> str | None:
    """Return what is wrong with one layer's format whatever the target, None if nothing is."""
    if name not in known:
        return (
            f"layer {name!r}: the model has no such layer; the mix is of another model."
            + did_you_mean(name, list(known))
        )
    try:
        format_ = parse_format(format_name)
    except InputError as error:
        return f"layer {name!r}: {error}"
    columns = known[name].columns
    if not format_.fits(columns):
        return (
            f"layer {name!r}: format {format_name!r} does not fit its {columns} columns, which "
            f"{format_.columns_divisor} does not divide; these fit: "
            f"{', '.join(fitting_formats(columns, format_.family))}."
        )
    return None
