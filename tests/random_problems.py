"""Random tables and size tables for tests of the allocation, with plain recounts beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hawqkit.allocation.problem import SizeTable
from hawqkit.formats import parse_format
from hawqkit.records import Floats, Layer

SIX = ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64")
LLAMA = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def llama_layers(blocks: int) -> tuple[Layer, ...]:
    """The block matrices of SmolLM2-135M (30 blocks there), stored in bfloat16."""
    return tuple(
        Layer(f"model.layers.{block}.{leaf}", "linear", rows, columns, "bfloat16", block)
        for block in range(blocks)
        for leaf, (rows, columns) in LLAMA.items()
    )


def falling_scores(
    layers: Sequence[Layer], formats: Sequence[str], rng: np.random.Generator, unit: float = 1.0
) -> Floats:
    """Scores that fall by four a bit, with noise: (L, F), NaN where a format does not fit."""
    table = np.full((len(layers), len(formats)), np.nan)
    for row, layer in enumerate(layers):
        level = unit * layer.numel**0.3 * float(np.exp(rng.normal(0.0, 1.2)))
        for column, form in enumerate(map(parse_format, formats)):
            if form.fits(layer.columns):
                bits = form.code_bits(layer.dtype_bits)
                noise = float(np.exp(rng.normal(0.0, 0.15)))
                table[row, column] = 0.0 if form.bits is None else level * 4.0**-bits * noise
    return table


def random_layers(rng: np.random.Generator, count: int) -> tuple[Layer, ...]:
    """Small layers of many shapes; some columns take groups of 32 alone, some no group at all."""
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    return tuple(
        Layer(
            f"m.{index // 6}.{names[index % 6]}",
            "linear",
            int(rng.integers(1, 9)),
            int(rng.choice([24, 32, 64, 96, 128, 192])),
            str(rng.choice(["float32", "bfloat16"])),
            index // 6,
        )
        for index in range(count)
    )


def plain_size_table(
    layers: Sequence[Layer], formats: Sequence[str], header: int = 8, fixed: int = 1000
) -> SizeTable:
    """Bytes of all weights and 1,000 more; each format in use adds a header not in the table."""
    costs = np.zeros((len(layers), len(formats)), dtype=np.int64)
    for row, layer in enumerate(layers):
        for column, name in enumerate(formats):
            form = parse_format(name)
            if form.fits(layer.columns):
                bits = form.total_bits(layer.rows, layer.columns, layer.dtype_bits)
                costs[row, column] = bits // 8

    def exact(mix: Mapping[str, str]) -> int:
        return fixed + header * len(set(mix.values())) + weight_bytes(layers, mix)

    return SizeTable("plain", costs, fixed, exact)


def weight_bytes(layers: Sequence[Layer], mix: Mapping[str, str]) -> int:
    """Bytes of the weights of a mix."""
    return sum(
        parse_format(mix[layer.name]).total_bits(layer.rows, layer.columns, layer.dtype_bits) // 8
        for layer in layers
    )
