from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils.match import match_name
from configuration_cases import allocation, model

from hawqkit.errors import Unsupported
from hawqkit.records import ActivationRanges
from hawqkit.targets import llm_compressor


def modifier(folder: Path) -> dict[str, object]:
    text = (folder / "recipe.yaml").read_text()
    read: dict[str, object] = yaml.safe_load(text)["default_stage"]["default_modifiers"][
        "QuantizationModifier"
    ]
    return read


def test_the_recipe_is_read_by_the_consumers_own_classes(tmp_path: Path) -> None:
    names = ("m.1", "m.11", "m.12", "m.2", "a.b", "axb")
    layers, facts = model(names)
    mix = {"m.1": "int4-g64", "m.11": "int3-channel", "m.12": "int4-g64", "m.2": "w8a8",
           "a.b": "fp8-e4m3-tensor", "axb": "none"}  # fmt: skip
    llm_compressor.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    read = modifier(tmp_path / "out")
    groups = read["config_groups"]
    assert isinstance(groups, dict)
    assert len(groups) == 4
    schemes = [QuantizationScheme.model_validate(group) for group in groups.values()]
    for name, format_name in mix.items():
        matching = [s for s in schemes if any(match_name(name, t) for t in s.targets)]
        ignored = any(match_name(name, t) for t in read["ignore"])  # type: ignore[union-attr]
        assert ignored == (format_name == "none"), name
        assert len(matching) == (format_name != "none"), name
    by_bits = {(s.weights.num_bits, str(s.weights.type)): s for s in schemes if s.weights}
    assert by_bits[4, "int"].weights.group_size == 64
    assert by_bits[3, "int"].weights.strategy == "channel"
    assert by_bits[8, "float"].weights.strategy == "tensor"
    assert by_bits[8, "int"].input_activations.dynamic is True


def test_inputs_that_were_measured_otherwise_are_refused(tmp_path: Path) -> None:
    layers, facts = model(("up",))
    ranges = ActivationRanges("", "", "min-max", "dynamic", None, False, (8,), 0, {})
    given = replace(allocation({"up": "w8a8"}), activations=ranges)
    with pytest.raises(Unsupported, match="dynamic asymmetric"):
        llm_compressor.write_from_facts(given, tmp_path / "out", layers, facts)
