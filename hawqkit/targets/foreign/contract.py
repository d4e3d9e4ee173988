"""What a reader of foreign mixes returns, and how it says what it cannot name. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hawqkit.formats import GROUP_SIZES, INTEGER_BITS, NONE
from hawqkit.records import Layer


@dataclass(frozen=True, slots=True)
class ForeignMix:
    """A mix that somebody else made.

    Attributes:
        kind: whose form it has, `gptq` say.
        layers: layer name -> format name, for every layer of the model; `none` where it stays.
        notes: what the names of formats do not say of it.
        unnamed: layer name -> what it is stored as, where hawqkit has no format of that kind.
    """

    kind: str
    layers: dict[str, str]
    notes: tuple[str, ...] = ()
    unnamed: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Collected:
    """Formats of layers as a reader finds them."""

    layers: dict[str, str] = field(default_factory=dict)
    unnamed: dict[str, str] = field(default_factory=dict)

    def keep(self, layer: Layer) -> None:
        """Note that a layer stays as it is stored."""
        self.layers[layer.name] = NONE.name

    def give(self, layer: Layer, name: str | None, described: str) -> None:
        """Note a layer's format, or what it is stored as where that has no name."""
        if name is None:
            self.unnamed[layer.name] = described
        else:
            self.layers[layer.name] = name

    def mix(self, kind: str, notes: Sequence[str] = ()) -> ForeignMix:
        """Return what was collected."""
        return ForeignMix(kind, self.layers, tuple(notes), self.unnamed)


def integer_format(
    bits: Any, group_size: Any, *, symmetric: bool, columns: int, acts: int | None = None
) -> str | None:
    """Return the name of an integer format, None where there is none.

    A group as wide as the row, or one of -1, is a row.

    >>> integer_format(4, 128, symmetric=False, columns=256)
    'int4-g128-asym'
    >>> integer_format(4, -1, symmetric=True, columns=256)
    'int4-channel'
    """
    if bits not in INTEGER_BITS or isinstance(bits, bool):
        return None
    group = "channel" if group_size in (None, -1, 0, columns) else f"g{group_size}"
    if group != "channel" and group_size not in GROUP_SIZES:
        return None
    tail = "" if acts is None else f"-a{acts}"
    return f"int{bits}-{group}{'' if symmetric else '-asym'}{tail}"


def described(settings: Mapping[str, Any]) -> str:
    """Return settings in a few words, for a message."""
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
