from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from configuration_cases import allocation, model
from transformers.quantizers.quantizers_utils import should_convert_module

from hawqkit.errors import Unsupported
from hawqkit.records import ActivationRanges
from hawqkit.targets import bitsandbytes

NAMES = ("up", "m.1.up", "m.11.up", "m.1", "lm_head", "m.1.up.lora")


def test_the_list_leaves_out_what_it_names_alone_by_the_rule_of_transformers(
    tmp_path: Path,
) -> None:
    # the naive list leaves out more: what ends so, and what lies below
    assert not should_convert_module("m.1.up", ["up"])
    assert not should_convert_module("m.1.up.lora", ["m.1.up"])
    for kept in (("up",), ("m.1",), ("m.1.up", "lm_head"), ()):
        layers, facts = model(NAMES)
        mix = {name: "none" if name in kept else "fp4-g64" for name in NAMES}
        bitsandbytes.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
        settings = json.loads((tmp_path / "out" / "bitsandbytes.json").read_text())
        assert settings["load_in_4bit"] is True
        assert settings["bnb_4bit_quant_type"] == "fp4"
        listed = settings["llm_int8_skip_modules"]
        assert [n for n in NAMES if not should_convert_module(n, listed)] == [
            n for n in NAMES if n in kept
        ]
        assert not should_convert_module("norm_like", listed)  # a matrix that is no layer


def test_a_second_format_is_refused_with_the_one_that_most_layers_have(tmp_path: Path) -> None:
    layers, facts = model(("a", "b", "c"))
    mix = {"a": "nf4-g64", "b": "nf4-g64", "c": "fp4-g64"}
    with pytest.raises(Unsupported, match=r"1 problem\n.*'c'.*'nf4-g64' or 'none' fits"):
        bitsandbytes.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)


def test_inputs_that_were_measured_otherwise_are_refused(tmp_path: Path) -> None:
    layers, facts = model(("a",))
    mix = {"a": "int8-channel-a8"}
    ranges = ActivationRanges("", "", "min-max", "static", None, True, (8,), 0, {})
    static = replace(allocation(mix), activations=ranges)
    with pytest.raises(Unsupported, match="static"):
        bitsandbytes.write_from_facts(static, tmp_path / "out", layers, facts)
    bitsandbytes.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    settings = json.loads((tmp_path / "out" / "bitsandbytes.json").read_text())
    assert (settings["load_in_8bit"], settings["llm_int8_threshold"]) == (True, 0.0)
    assert (
        "the prediction holds for what it makes" not in (tmp_path / "out" / "NOTE.md").read_text()
    )
