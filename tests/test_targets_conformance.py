from __future__ import annotations

from pathlib import Path

import pico
import pytest

from hawqkit.models.model import wrap_model
from hawqkit.targets import TARGETS, compressed_tensors, find_target
from hawqkit.targets.conformance import PLAIN, Check, check_sizes, checks_of, example_mix

# tensors of GGUF and ONNX are known by a layout that is measured on a model
MEASURED = ("gguf", "onnx")
CASES = [
    pytest.param(name, check, id=f"{name}-{check.__name__}")
    for name in TARGETS
    if name not in MEASURED
    for check in checks_of(find_target(name))
]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_every_target_of_the_table_conforms(name: str, check: Check, tmp_path: Path) -> None:
    check(find_target(name), tmp_path)


def test_the_bytes_of_an_export_are_those_predicted(tmp_path: Path) -> None:
    model = wrap_model(pico.llama(hidden=256, intermediate=256), name="pico")
    names = tuple(layer.name for layer in model.layers if layer.kind == "linear")
    mix = example_mix(compressed_tensors, names)
    assert set(PLAIN) < set(mix)
    assert check_sizes(compressed_tensors, mix, model, tmp_path / "out")
