"""Names of formats that round a layer's inputs too, and who refuses them."""

from __future__ import annotations

import re

import pytest

from hawqkit.allocation.resources import bit_operations
from hawqkit.errors import InputError
from hawqkit.formats import (
    ACTIVATION_BITS,
    INTEGER_BITS,
    NAME_PATTERN,
    activation_bits_of,
    format_names,
    pair_names,
    parse_format,
    same_formats,
    with_activations,
)
from hawqkit.records import Layer, ModelFacts, Tensor
from hawqkit.targets import find_target


@pytest.mark.parametrize("weights", INTEGER_BITS)
@pytest.mark.parametrize("inputs", ACTIVATION_BITS)
def test_every_pair_is_a_channel_format_with_bits_for_the_inputs(weights: int, inputs: int) -> None:
    short, long = f"w{weights}a{inputs}", f"int{weights}-channel-a{inputs}"
    for tail in ("", "-asym"):
        pair = parse_format(short + tail)
        assert (pair.name, pair.bits, pair.activation_bits) == (short + tail, weights, inputs)
        assert pair.group_size is None
        assert pair.symmetric is (tail == "")
        spelled = parse_format(long.replace("-a", f"{tail}-a", 1))
        assert same_formats([pair.name, spelled.name]) == [(pair.name, spelled.name)]
        assert pair.weights.name == f"int{weights}-channel{tail}"
        assert pair.weights == parse_format(pair.weights.name)


def test_a_name_with_activations_stores_what_its_weights_store() -> None:
    for name in format_names("integer"):
        if name == "none":
            continue
        plain, rounded = parse_format(name), parse_format(f"{name}-a4")
        assert rounded.weights == plain
        assert plain.weights is plain
        assert rounded.total_bits(6, 128, 32) == plain.total_bits(6, 128, 32)
        assert rounded.fits(96) == plain.fits(96)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w4a16", "inputs are quantized to 2, 3, 4, 5, 6, 8 bits, not to 16"),
        ("w7a8", "no integer format with 7 bits"),
        ("w9a9", "not to 9"),
        ("none-a8", "use an integer format such as int8-channel-a8"),
        ("int4-g46-a8", "Did you mean 'int4-g64-a8'?"),
        ("int4-g64-a7", "not to 7"),
        ("w4a", "Did you mean 'w4a8'?"),
        ("w4", "w4a8 is short for int4-channel-a8"),
        ("w4-a8", "Did you mean"),
        ("int4-g64-a8-asym", "formats are int<bits>-<group>"),
    ],
)
def test_a_wrong_name_is_refused_with_what_is_wrong(name: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_format(name)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400  # of hundreds of names none but the nearest is listed


def test_the_pattern_of_the_schema_is_the_grammar() -> None:
    bits = range(1, 10)
    groups = ("g16", "g32", "g64", "g128", "channel")
    names = [
        f"int{b}-{g}{t}-a{a}" for b in bits for g in groups for t in ("", "-asym") for a in bits
    ]
    names += [f"w{b}a{a}{t}" for b in bits for a in bits for t in ("", "-asym")]
    for name in (*names, *format_names("integer")):
        try:
            known = parse_format(name).activation_bits is not None
        except InputError:
            known = False
        assert bool(re.fullmatch(NAME_PATTERN, name)) == known, name
    assert set(pair_names()) <= set(names)


def test_lists_of_formats_say_which_round_inputs() -> None:
    names = ["w4a4", "int4-g64", "none", "int3-g32-a8", "w2a4-asym"]
    assert with_activations(names) == ("w4a4", "int3-g32-a8", "w2a4-asym")
    assert activation_bits_of(names) == (8, 4)
    assert activation_bits_of(["int4-g64", "none"]) == ()


def test_bit_operations_count_the_bits_of_both() -> None:
    layer = Layer("conv", "convolution", 4, 9, "float32", macs=1000)
    counted = {n: bit_operations(layer, parse_format(n)) for n in ("w4a8", "int4-channel", "none")}
    assert counted == {"w4a8": 32_000, "int4-channel": 128_000, "none": 1_024_000}
    lookup = Layer("embed", "embedding", 4, 8, "float32")
    assert bit_operations(lookup, parse_format("w4a8")) == 0


def test_a_target_of_weights_refuses_inputs_and_bits_holds_them() -> None:
    layer = Layer("model.layers.0.mlp.up_proj", "linear", 64, 64, "bfloat16", 0)
    stored = Tensor(f"{layer.name}.weight", "bfloat16", (64, 64))
    facts = ModelFacts(
        "example", "", "LlamaForCausalLM", 4096, "bfloat16", (stored,), {"model_type": "llama"}
    )

    def problems(target: str, name: str) -> list[str]:
        return find_target(target).problems({layer.name: name}, [layer], facts)

    assert problems("compressed-tensors", "int4-g64") == []
    (problem,) = problems("compressed-tensors", "int4-g64-a8")
    assert "writes 'int8-channel-a8' alone" in problem
    assert "use that or 'int4-g64', or export 'bits'" in problem
    assert problems("compressed-tensors", "w8a8") == []
    assert problems("bits", "int4-g64-a8") == []
