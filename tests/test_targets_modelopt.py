from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
from configuration_cases import allocation, model

from hawqkit.errors import Unsupported
from hawqkit.targets import modelopt


def test_the_entry_that_turns_everything_off_comes_first_and_later_ones_win(
    tmp_path: Path,
) -> None:
    names = ("m.1.up", "m.11.up", "m.1.down", "x[0]", "x0")
    layers, facts = model(names)
    mix = {"m.1.up": "int4-g64", "m.11.up": "int3-channel", "m.1.down": "fp8-e4m3-tensor",
           "x[0]": "fp8-e4m3-channel", "x0": "none"}  # fmt: skip
    modelopt.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    config = json.loads((tmp_path / "out" / "quant_cfg.json").read_text())
    assert config["algorithm"] == "max"
    assert config["quant_cfg"][0] == {"quantizer_name": "*", "enable": False}

    def decided(name: str) -> object:
        got = None
        for entry in config["quant_cfg"]:
            if fnmatch(f"{name}.weight_quantizer", entry["quantizer_name"]):
                got = entry.get("cfg")
        return got

    assert [decided(name) for name in names] == [
        {"num_bits": 4, "axis": None, "block_sizes": {"-1": 64}},
        {"num_bits": 3, "axis": 0},
        {"num_bits": [4, 3], "axis": None},
        {"num_bits": [4, 3], "axis": 0},
        None,
    ]


def test_layers_that_its_exporters_merge_share_whatever_the_runtime(tmp_path: Path) -> None:
    layers, facts = model(("m.0.gate_proj", "m.0.up_proj"))
    mix = {"m.0.gate_proj": "int4-g64", "m.0.up_proj": "int8-g64"}
    with pytest.raises(Unsupported, match="must share a format"):
        modelopt.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
