from __future__ import annotations

import json
import re
from pathlib import Path

from configuration_cases import allocation, model

from hawqkit.targets import neural_compressor


def test_the_last_pattern_that_matches_a_prefix_decides_and_only_its_own_layer(
    tmp_path: Path,
) -> None:
    names = ("m.1", "m.11", "m.1.fc", "m.1.fc2", "a.b", "axb")
    layers, facts = model(names)
    mix = {"m.1": "int4-g64", "m.11": "int3-channel-asym", "m.1.fc": "int2-g32",
           "m.1.fc2": "int8-g128", "a.b": "int5-channel", "axb": "none"}  # fmt: skip
    neural_compressor.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    written = json.loads((tmp_path / "out" / "rtn_config.json").read_text())

    def decided(patterns: dict[str, object], name: str) -> object:
        found = [settings for pattern, settings in patterns.items() if re.match(pattern, name)]
        return found[-1] if found else None

    wanted = [
        {"bits": 4, "group_size": 64, "use_sym": True, "use_full_range": True},
        {"bits": 3, "group_size": -1, "use_sym": False, "use_full_range": False},
        {"bits": 2, "group_size": 32, "use_sym": True, "use_full_range": True},
        {"bits": 8, "group_size": 128, "use_sym": True, "use_full_range": True},
        {"bits": 5, "group_size": -1, "use_sym": True, "use_full_range": True},
        None,
    ]
    assert [decided(written, name) for name in names] == wanted
    naive = dict(zip(names[:5], wanted[:5], strict=True))
    assert [decided(naive, name) for name in names] != wanted
