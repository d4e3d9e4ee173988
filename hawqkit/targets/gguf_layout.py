"""How a GGUF file is laid out, so that its bytes are known for every mix before it is written.

    magic, version, counts, key-values                 `head` bytes, the same for every mix
    for each tensor: name, dimensions, type, offset    8 + name + 4 + 8 dimensions + 4 + 8 bytes
    each tensor's data                                 all parts padded to the alignment

A mix changes the data alone, so sizes add up: the bytes of a file are exact sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hawqkit.formats import Format, parse_format

# Types that hold one entry at a time: name in a file -> (name in hawqkit, bytes of an entry).
PLAIN_TYPES = {"f32": ("float32", 4), "f16": ("float16", 2), "bf16": ("bfloat16", 2)}
PLAIN_OF = {dtype: name for name, (dtype, _) in PLAIN_TYPES.items()}

# `general.file_type`: the mix that llama.cpp would call so; it names most of the weights alone.
_FILE_TYPES = {
    "f32": 0, "f16": 1, "bf16": 32, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9,
    "q2_k": 10, "q3_k": 12, "q4_k": 15, "q5_k": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20,
    "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq2_s": 28, "iq4_xs": 30, "iq1_m": 31,
    "tq1_0": 36, "tq2_0": 37, "mxfp4": 38,
}  # fmt: skip
_GUESSED = 1024  # llama.cpp's word for "not said": it then looks at the tensors


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the file as it is kept.

    Attributes:
        name: in the file.
        shape: as numpy has it, outputs first.
        type: name in lower case, `f32`, `q4_1`, ...
        nbytes: of its data, without padding.
        layer: name of the layer that it is, empty for all others.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    layer: str = ""

    def bytes_in(self, format: Format) -> int:
        """Return the bytes of its data in a format; `none` is as it is kept."""
        if not format.quantizes:
            return self.nbytes
        rows, columns = self.shape
        return format.total_bits(rows, columns, 0) // 8

    def type_in(self, format: Format) -> str:
        """Return the name of its type in a format."""
        return format.element if format.quantizes else self.type


@dataclass(frozen=True, slots=True)
class Layout:
    """A file without its data.

    Attributes:
        architecture: llama.cpp's name.
        head: bytes before the list of tensors.
        alignment: what every tensor's offset is a multiple of.
        places: the tensors in their order.
    """

    architecture: str
    head: int
    alignment: int
    places: tuple[Place, ...]

    def padded(self, nbytes: int) -> int:
        """Return bytes rounded up to the alignment."""
        return -(-nbytes // self.alignment) * self.alignment

    def file_bytes(self, mix: Mapping[str, str]) -> int:
        """Return the bytes of the file of a mix, equal to the byte."""
        listed = sum(24 + len(p.name.encode()) + 8 * len(p.shape) for p in self.places)
        data = sum(self.padded(p.bytes_in(f)) for p, f in self.chosen(mix))
        return self.padded(self.head + listed) + data

    def chosen(self, mix: Mapping[str, str]) -> Iterator[tuple[Place, Format]]:
        """Yield every tensor with its format; what the mix does not name stays as it is kept."""
        for place in self.places:
            yield place, parse_format(mix.get(place.layer, "none") if place.layer else "none")

    def file_type(self, mix: Mapping[str, str]) -> int:
        """Return `general.file_type`: of the type that most weights have, norms apart."""
        entries: dict[str, int] = {}
        for place, format_ in self.chosen(mix):
            if len(place.shape) > 1:
                name = place.type_in(format_)
                entries[name] = entries.get(name, 0) + math.prod(place.shape)
        most = max(entries, key=lambda name: (entries[name], name)) if entries else "f32"
        return _FILE_TYPES.get(most, _GUESSED)

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values; `from_plain` reads them."""
        return {
            "architecture": self.architecture,
            "head": self.head,
            "alignment": self.alignment,
            "tensors": [{**asdict(p), "shape": list(p.shape)} for p in self.places],
        }


def from_plain(plain: Mapping[str, Any]) -> Layout:
    """Read what `Layout.plain` returned."""
    places = [Place(**{**t, "shape": tuple(t["shape"])}) for t in plain["tensors"]]
    return Layout(plain["architecture"], plain["head"], plain["alignment"], tuple(places))


def plain_bytes(type_name: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor of one of `PLAIN_TYPES`."""
    return math.prod(shape) * PLAIN_TYPES[type_name][1]
