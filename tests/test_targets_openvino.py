from __future__ import annotations

import json
from pathlib import Path

import pytest
from configuration_cases import allocation, model

from hawqkit.errors import Unsupported
from hawqkit.targets import openvino


def test_passes_go_from_8_bits_to_4_to_2_to_3_and_name_each_layer_once(tmp_path: Path) -> None:
    mix = {"a": "int3-g64", "b": "int4-channel-asym", "c": "int2-channel", "d": "none",
           "e": "int8-channel", "f": "int3-g64", "g": "int4-g32"}  # fmt: skip
    layers, facts = model(tuple(mix))
    openvino.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    assert json.loads((tmp_path / "out" / "openvino.json").read_text()) == [
        {"mode": "int8_sym", "group_size": -1, "layers": ["e"]},
        {"mode": "int4_asym", "group_size": -1, "layers": ["b"]},
        {"mode": "int4_sym", "group_size": 32, "layers": ["g"]},
        {"mode": "int2_sym", "group_size": -1, "layers": ["c"]},
        {"mode": "int3_sym", "group_size": 64, "layers": ["a", "f"]},
    ]


def test_a_second_format_of_3_bits_is_refused_which_nncf_would_not_take(tmp_path: Path) -> None:
    mix = {"a": "int3-g64", "b": "int3-channel", "c": "int3-g64", "d": "int2-g64", "e": "int2-g32"}
    layers, facts = model(tuple(mix))
    with pytest.raises(Unsupported, match=r"1 problem\n.*'b'.*'int3-g64' or another width fits"):
        openvino.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    mix["b"] = "int3-g64"
    assert openvino.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
