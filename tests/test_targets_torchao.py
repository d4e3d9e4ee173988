from __future__ import annotations

import json
from pathlib import Path

import pytest
from configuration_cases import allocation, model

from hawqkit.errors import Unsupported
from hawqkit.targets import torchao


def test_names_are_exact_and_sorting_the_keys_changes_nothing(tmp_path: Path) -> None:
    names = ("m.11.up", "m.1.up", "m.1.down", "head")
    layers, facts = model(names)
    mix = {"m.11.up": "int3-channel-asym", "m.1.up": "int4-g64", "m.1.down": "fp8-e5m2-channel",
           "head": "none"}  # fmt: skip
    torchao.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    text = (tmp_path / "out" / "torchao.json").read_text()
    config = json.loads(text)
    assert (config["_type"], config["_version"]) == ("FqnToConfig", 1)
    found = config["_data"]["fqn_to_config"]
    assert {name: entry["_type"] for name, entry in found.items()} == {
        "m.11.up": "IntxWeightOnlyConfig",
        "m.1.up": "IntxWeightOnlyConfig",
        "m.1.down": "Float8WeightOnlyConfig",
    }
    data = found["m.1.up"]["_data"]
    assert data["weight_dtype"]["_data"] == "int4"
    assert data["granularity"]["_data"] == {"group_size": 64}
    assert data["mapping_type"]["_data"] == "SYMMETRIC"
    assert found["m.11.up"]["_data"]["granularity"]["_data"] == {"axis": 0}
    shuffled = sorted(found.items())
    for name in names:
        assert torchao.decided(shuffled, name) == found.get(name)


def test_names_that_torchao_reads_otherwise_are_refused(tmp_path: Path) -> None:
    # a pattern, the word for all others, and a module called as the parameter of another one
    for names in (("re:a.*", "abc"), ("_default", "b"), ("a", "a.weight")):
        layers, facts = model(names)
        mix = {names[0]: "int4-g64", names[1]: "int8-g64"}
        with pytest.raises(Unsupported, match="would get"):
            torchao.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    assert list(tmp_path.iterdir()) == []


def test_the_note_claims_agreement_for_grids_that_are_the_same_alone(tmp_path: Path) -> None:
    layers, facts = model(("a", "b"))
    for format_name, agrees in (("int4-g64-asym", True), ("int4-g64", False)):
        mix = {"a": format_name, "b": "fp8-e4m3-channel"}
        torchao.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
        note = (tmp_path / "out" / "NOTE.md").read_text()
        assert ("the prediction holds for what it makes" in note) == agrees
