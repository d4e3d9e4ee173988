"""The types of GGUF files: blocks of columns that hold codes, scales and minima together.

Names are those of llama.cpp in lower case. Bits are those of a code; what is really stored is the
bytes of the blocks, 2.625 bits a weight for `q2_k` and 8.5 for `q8_0`.

Source: ggml's block structures; the figures are those of gguf-py's `GGML_QUANT_SIZES`.
"""

from __future__ import annotations

from hawqkit.formats.format import GGUF, Format

# name -> (bits of a code, columns of a block, bytes of a block, columns that share a scale)
_TYPES = {
    "q2_k": (2, 256, 84, 16),
    "q3_k": (3, 256, 110, 16),
    "iq4_xs": (4, 256, 136, 32),
    "iq4_nl": (4, 32, 18, 32),
    "q4_0": (4, 32, 18, 32),
    "q4_1": (4, 32, 20, 32),
    "q4_k": (4, 256, 144, 32),
    "q5_0": (5, 32, 22, 32),
    "q5_1": (5, 32, 24, 32),
    "q5_k": (5, 256, 176, 32),
    "q6_k": (6, 256, 210, 16),
    "q8_0": (8, 32, 34, 32),
}
_WITH_MINIMUM = ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k")

GGUFS: dict[str, Format] = {
    name: Format(
        name,
        bits,
        group,
        name not in _WITH_MINIMUM,
        family=GGUF,
        element=name,
        block=(columns, size),
    )
    for name, (bits, columns, size, group) in _TYPES.items()
}
