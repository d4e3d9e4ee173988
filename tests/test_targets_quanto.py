from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
from configuration_cases import allocation, model

from hawqkit.targets import quanto


def test_one_pass_a_type_and_each_glob_matches_its_layer_alone(tmp_path: Path) -> None:
    names = ("m.1.up", "m.11.up", "x[0]", "x0", "m.1.down")
    layers, facts = model(names)
    kinds = ("int4-channel-asym", "int8-channel", "int4-g128-asym", "none", "fp8-e5m2-channel")
    mix = dict(zip(names, kinds, strict=True))
    quanto.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    passes = json.loads((tmp_path / "out" / "quanto.json").read_text())
    reached = {
        one["weights"]: [n for n in names if any(fnmatch(n, glob) for glob in one["include"])]
        for one in passes
    }
    assert reached == {
        "qint4": ["m.1.up", "x[0]"],
        "qint8": ["m.11.up"],
        "qfloat8_e5m2": ["m.1.down"],
    }


@pytest.mark.parametrize(
    ("columns", "fits"),
    [(64, "channel"), (96, "channel"), (128, "both"), (200, "channel"), (256, "g128"),
     (576, None), (320, None), (160, None), (1536, "g128")],
)  # fmt: skip
def test_groups_that_quanto_would_not_take_are_refused(columns: int, fits: str | None) -> None:
    layers, facts = model(("a",))
    layers = [replace(layers[0], columns=columns)]
    for format_name in ("int4-g128-asym", "int2-channel-asym"):
        held = fits == "both" or (fits is not None and fits in format_name)
        found = quanto.problems({"a": format_name}, layers, facts)
        assert bool(found) == (not held), format_name
        if found and "quanto groups" in found[0]:
            assert ("int8-channel, none." in found[0]) is True
            assert ("-asym" in found[0].partition("these fit")[2]) == (fits is not None)
    assert not quanto.problems({"a": "int8-channel"}, layers, facts)
