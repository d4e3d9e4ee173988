"""Number formats: their names, and the bits that each of them really stores. No torch."""

from hawqkit.formats.floats import FLOATS
from hawqkit.formats.format import (
    FLOAT,
    GGUF,
    INTEGER,
    NONE,
    SCALE_BITS,
    WORD_BITS,
    Format,
)
from hawqkit.formats.gguf import GGUFS
from hawqkit.formats.integers import (
    ACTIVATION_BITS,
    GROUP_SIZES,
    INTEGER_BITS,
    NAME_PATTERN,
    pair_names,
)
from hawqkit.formats.names import (
    activation_bits_of,
    fitting_formats,
    format_names,
    parse_format,
    same_formats,
    with_activations,
)

__all__ = [
    "ACTIVATION_BITS",
    "FLOAT",
    "FLOATS",
    "GGUF",
    "GGUFS",
    "GROUP_SIZES",
    "INTEGER",
    "INTEGER_BITS",
    "NAME_PATTERN",
    "NONE",
    "SCALE_BITS",
    "WORD_BITS",
    "Format",
    "activation_bits_of",
    "fitting_formats",
    "format_names",
    "pair_names",
    "parse_format",
    "same_formats",
    "with_activations",
]
