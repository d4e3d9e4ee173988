from __future__ import annotations

import json
import re
from pathlib import Path

from configuration_cases import allocation, model

from hawqkit.targets import gptqmodel

ATTENTION = tuple(f"model.layers.1.self_attn.{x}_proj" for x in "qkv")
MLP = ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")


def decided(dynamic: dict[str, object], name: str) -> object:
    """Return what vLLM's `get_dynamic_override` takes: False keeps, None is the default."""
    for pattern, settings in dynamic.items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return False
        elif re.match(pattern.removeprefix("+:"), name):
            return settings
    return None


def test_one_pattern_matches_the_layers_and_their_fused_name(tmp_path: Path) -> None:
    names = (*ATTENTION, *MLP, "model.layers.11.mlp.up_proj")
    layers, facts = model(names)
    mix = dict.fromkeys(ATTENTION, "int4-g64") | dict.fromkeys(MLP, "int8-channel-asym")
    gptqmodel.write_from_facts(allocation(mix, "vllm"), tmp_path / "out", layers, facts)
    dynamic = json.loads((tmp_path / "out" / "dynamic.json").read_text())
    four = {"bits": 4, "group_size": 64, "sym": True}
    eight = {"bits": 8, "group_size": -1, "sym": False}
    for name in (*ATTENTION, "model.layers.1.self_attn.qkv_proj"):
        assert decided(dynamic, name) == four
    for name in (*MLP, "model.layers.1.mlp.gate_up_proj"):
        assert decided(dynamic, name) == eight
    assert decided(dynamic, "model.layers.11.mlp.up_proj") is False
    assert sum(key.startswith("+:") for key in dynamic) == 2


def test_layers_of_different_formats_have_patterns_of_their_own(tmp_path: Path) -> None:
    layers, facts = model(MLP)
    mix = {MLP[0]: "int4-g64", MLP[1]: "none"}
    gptqmodel.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    dynamic = json.loads((tmp_path / "out" / "dynamic.json").read_text())
    assert decided(dynamic, MLP[0]) == {"bits": 4, "group_size": 64, "sym": True}
    assert decided(dynamic, MLP[1]) is False
    assert decided(dynamic, "model.layers.1.mlp.gate_up_proj") is None
    # unanchored, the pattern of one layer decides for others too
    naive = {key.rstrip("$").replace("\\.", "."): value for key, value in dynamic.items()}
    assert decided(naive, MLP[0] + "_extra") is not None
    assert decided(dynamic, MLP[0] + "_extra") is None
