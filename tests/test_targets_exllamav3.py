from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from configuration_cases import allocation, model

from hawqkit.records import Tensor
from hawqkit.targets import exllamav3


def decided(tensors: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """Resolve a recipe as exllamav3 1.6.5 does; raises where that refuses it.

    Of the exact key and the globs that match, the one that comes last; each entry must match, and
    each key must be covered (`create_q_strategy_from_recipe`).
    """
    found = {}
    used = set()
    for key in keys:
        for entry, bits in tensors.items():
            is_glob = any(c in entry for c in "*?[")
            if re.match(fnmatch.translate(entry), key) if is_glob else entry == key:
                found[key] = bits
                used.add(entry)
    assert set(found) == set(keys)
    assert used == set(tensors)
    return found


def test_every_layer_of_the_blocks_is_covered_and_nothing_else(tmp_path: Path) -> None:
    names = ("m.0.up", "m.0.down", "m.11.up", "m.1.up", "m.1.x[0]", "m.1.x0", "lm_head", "m.embed")
    layers, facts = model(names)
    layers = [replace(x, kind="embedding") if x.name == "m.embed" else x for x in layers]
    layers[1] = replace(layers[1], rows=384)
    # m.0.gate was excluded from the layers, and keeps its weight
    gate = Tensor("m.0.gate.weight", "bfloat16", (128, 128))
    facts = replace(facts, tensors=(*facts.tensors, gate))
    mix = {"m.0.up": "int2-channel", "m.0.down": "int4-channel", "m.11.up": "int8-channel",
           "m.1.up": "none", "m.1.x[0]": "int3-channel", "m.1.x0": "int6-channel",
           "lm_head": "int5-channel", "m.embed": "none"}  # fmt: skip
    exllamav3.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    inside = [n for n in (*names, "m.0.gate") if re.search(r"\.\d+\.", n)]
    assert decided(recipe["tensors"], inside) == {
        "m.0.up": 2, "m.0.down": 4, "m.11.up": 8, "m.1.up": 16, "m.1.x[0]": 3, "m.1.x0": 6,
        "m.0.gate": 16,
    }  # fmt: skip
    assert recipe["head_bits"] == 5
    # weights that are kept do not count: (2 + 3 * 4 + 8 + 3 + 6) / 7
    assert recipe["target_bpw"] == pytest.approx(31 / 7, abs=1e-4)
    tensors = dict(recipe["tensors"])
    assert all(
        isinstance(bits, int) and (1 <= bits <= 8 or bits == 16) for bits in tensors.values()
    )
    note = (tmp_path / "out" / "NOTE.md").read_text()
    assert "CUDA" in note
    assert "not run it" in note


def test_the_script_ends_with_a_reason_where_there_is_no_cuda_device(tmp_path: Path) -> None:
    layers, facts = model(("m.0.up",))
    mix = {"m.0.up": "int4-channel"}
    exllamav3.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "out" / "apply.py"), str(tmp_path), str(tmp_path / "made")],
        capture_output=True, text=True, check=False,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr
    assert not (tmp_path / "made").exists()
