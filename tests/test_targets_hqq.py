from __future__ import annotations

import json
from pathlib import Path

from configuration_cases import allocation, model

from hawqkit.targets import hqq


def test_layers_that_are_called_alike_in_all_blocks_have_settings_of_their_own(
    tmp_path: Path,
) -> None:
    mix = {"m.0.up": "int4-g64-asym", "m.1.up": "int3-channel-asym", "m.2.up": "none"}
    layers, facts = model(tuple(mix))
    hqq.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    assert json.loads((tmp_path / "out" / "hqq.json").read_text()) == {
        "m.0.up": {"nbits": 4, "group_size": 64},
        "m.1.up": {"nbits": 3, "group_size": None},
    }
