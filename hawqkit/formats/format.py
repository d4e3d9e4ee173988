"""One number format of a weight, and the bits that it really stores. One class for every family."""

from __future__ import annotations

from dataclasses import dataclass, replace

SCALE_BITS = 16
WORD_BITS = 32  # codes are packed into 32-bit words, row by row

INTEGER, FLOAT, GGUF = "integer", "float", "gguf"


@dataclass(frozen=True, slots=True)
class Format:
    """One number format for a weight of shape (rows, columns); groups run along the columns.

    Attributes:
        name: the permanent name.
        bits: bits of a code; None for `none`.
        group_size: columns that share a scale; None means the whole row (`channel`), or the whole
            weight where `per_tensor` says so.
        symmetric: True if there is no zero point.
        activation_bits: bits of the layer's inputs (see `quantize.activations`); None where they
            stay as they are. An embedding looks up and has no input to quantize: there it means
            nothing.
        family: `integer`, `float` or `gguf`: which module of `quantize` rounds to it.
        element: what a code is where it is no integer: `e2m1`, `nf4`, or the GGUF type's name.
        scale_bits: bits of one scale.
        tensor_bits: bits that the whole weight stores once, beside the scales of its groups.
        per_tensor: whether all groups are one, of the whole weight.
        block: (columns, bytes) of one block of a GGUF type, which holds scales and codes together.
    """

    name: str
    bits: int | None
    group_size: int | None = None
    symmetric: bool = True
    activation_bits: int | None = None
    family: str = INTEGER
    element: str = ""
    scale_bits: int = SCALE_BITS
    tensor_bits: int = 0
    per_tensor: bool = False
    block: tuple[int, int] | None = None

    @property
    def quantizes(self) -> bool:
        """False for `none`, which keeps the stored dtype."""
        return self.bits is not None

    @property
    def weights(self) -> Format:
        """The same format of the weight, with inputs as they are.

        >>> from hawqkit.formats import parse_format
        >>> parse_format("w4a8").weights.name
        'int4-channel'
        """
        if self.activation_bits is None:
            return self
        plain = replace(self, activation_bits=None)
        return replace(plain, name=integer_name(plain))

    @property
    def columns_divisor(self) -> int | None:
        """What the columns must be a multiple of, None where any number fits."""
        return self.block[0] if self.block is not None else self.group_size

    def fits(self, columns: int) -> bool:
        """Whether the group size, or the block of a GGUF type, divides the columns."""
        divisor = self.columns_divisor
        return divisor is None or columns % divisor == 0

    def groups_per_row(self, columns: int) -> int:
        """Return the number of scales a row of `columns` entries has."""
        return 1 if self.group_size is None else columns // self.group_size

    def code_bits(self, stored_bits: int) -> int:
        """Return bits per entry of the codes alone; `none` counts its stored dtype."""
        return stored_bits if self.bits is None else self.bits

    def total_bits(self, rows: int, columns: int, stored_bits: int) -> int:
        """Return the bits that a (rows, columns) weight takes: codes, padding, scales, zero points.

        Codes are packed into 32-bit words row by row; a scale takes `scale_bits`, 16 for integers;
        a zero point takes as many bits as a code, packed into words along the rows. A GGUF type
        takes the bytes of its blocks. Quantized inputs store nothing that counts: a static range is
        two numbers a layer, a dynamic one none.

        >>> from hawqkit.formats import parse_format
        >>> parse_format("int4-g64").total_bits(2, 128, 32) / (2 * 128)
        4.25
        >>> parse_format("q4_k").total_bits(2, 256, 32) / (2 * 256)
        4.5
        """
        if self.bits is None:
            return rows * columns * stored_bits
        if self.block is not None:
            return rows * (columns // self.block[0]) * self.block[1] * 8
        groups = self.groups_per_row(columns)
        scales = 1 if self.per_tensor else rows * groups
        codes = rows * _padded(columns * self.bits)
        zeros = 0 if self.symmetric else groups * _padded(rows * self.bits)
        return codes + scales * self.scale_bits + zeros + self.tensor_bits


def integer_name(format: Format) -> str:
    """Return the long name of an integer format.

    >>> integer_name(Format("w4a8", 4, None, True, 8))
    'int4-channel-a8'
    """
    group = "channel" if format.group_size is None else f"g{format.group_size}"
    tail = "" if format.activation_bits is None else f"-a{format.activation_bits}"
    return f"int{format.bits}-{group}{'' if format.symmetric else '-asym'}{tail}"


def _padded(bits: int) -> int:
    return -(-bits // WORD_BITS) * WORD_BITS


NONE = Format("none", None)
