from __future__ import annotations

import re
from pathlib import Path

import onnx_cases as cases
import pico
import pytest
import torch
from torch import Tensor, nn

from hawqkit.errors import InputError, Unsupported
from hawqkit.models.model import wrap_model
from hawqkit.models.signature import with_inputs
from hawqkit.quantize.activations import calibrate_activations
from hawqkit.records import Layer
from hawqkit.targets import onnx as target
from hawqkit.targets.onnx_writer import write_folder

pytest.importorskip("onnx")  # what the target needs; an extra
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Hidden(nn.Module):
    """A Linear whose weight is read a second time, where no module is called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.twice = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.twice(x) + x @ (2.0 * self.twice.weight).t()  # type: ignore[no-any-return]


def test_a_layer_that_cannot_be_found_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model, examples = cases.loaded(cases.filled(Hidden()), {"x": cases.images(2, 32)})
    with pytest.raises(
        Unsupported, match=r"would stay in float.*\n.*'twice': its weight is read by"
    ):
        target.measure_graph(model, examples)
    assert not list(tmp_path.iterdir())


def one_layer(kind: str = "linear") -> Layer:
    return Layer("fc", kind, 64, 128, "float32")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("int3-g64", "linear", "kernels for weights of 4 and 8 bits, none for 3.*'bits'"),
        ("int2-channel-asym", "convolution", "none for 2"),
        ("w4a4", "linear", "inputs of 8 bits, not of 4"),
        ("int8-g64-a8", "linear", "choose 'int8-channel-a8'"),
        ("int8-g64-asym-a8", "linear", "choose 'int8-channel-asym-a8'"),
    ],
)
def test_what_the_runtime_has_no_kernel_for_is_refused(name: str, kind: str, message: str) -> None:
    facts = wrap_model(nn.Linear(128, 64), name="net").facts
    (problem,) = target.problems({"fc": name}, [one_layer(kind)], facts)
    assert re.search(message, problem), problem
    assert "layer 'fc'" in problem


@pytest.mark.parametrize("name", ["none", "int4-g64", "int8-channel-asym", "w4a8", "int4-g64-a8"])
def test_what_it_holds_is_not_refused(name: str) -> None:
    facts = wrap_model(nn.Linear(128, 64), name="net").facts
    assert target.problems({"fc": name}, [one_layer()], facts) == []


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    model, _ = cases.loaded(*cases.cnn())
    mix = {"stem": "int3-channel", "head": "int5-g64", "tail": "int8-channel"}
    with pytest.raises(Unsupported, match="3 problems") as failure:
        target.write(cases.allocation(mix), tmp_path / "out", model)
    assert all(f"layer {name!r}" in str(failure.value) for name in mix)
    assert not list(tmp_path.iterdir())


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    model = wrap_model(pico.llama(), name="pico", tokenizer=pico.tokenizer())
    with pytest.raises(Unsupported, match=r"language model.*'compressed-tensors'"):
        target.write(cases.allocation({}), tmp_path / "out", model)


def test_without_inputs_it_says_what_to_give(tmp_path: Path) -> None:
    model, _ = cases.loaded(*cases.tiny())
    with pytest.raises(Unsupported, match=r"shapes of its inputs are not known.*examples="):
        target.write(cases.allocation({}), tmp_path / "out", model)
    with pytest.raises(Unsupported, match=r"measure_graph\(model, examples\)"):
        target.size({}, model.layers, model.facts)


def test_ranges_that_are_missing_or_dynamic_are_refused(tmp_path: Path) -> None:
    model, examples = cases.loaded(*cases.cnn())
    model = with_inputs(model, examples)
    given = cases.allocation({"stem": "w8a8"})
    with pytest.raises(InputError, match=r"layer 'stem'.*no range of its input is known"):
        write_folder(given, tmp_path / "out", model, None)
    ranges = calibrate_activations(model, examples, model.layers, [8], mode="dynamic")
    with pytest.raises(Unsupported, match="'static'"):
        write_folder(given, tmp_path / "out", model, ranges)
    assert not list(tmp_path.iterdir())


class Fixed(nn.Module):
    """A forward that writes its batch size into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(2, 32))  # type: ignore[no-any-return]


def test_a_forward_that_fixes_the_number_of_examples_is_refused() -> None:
    model, examples = cases.loaded(cases.filled(Fixed()), {"x": cases.images(2, 32)})
    with pytest.raises(Unsupported, match=r"inferred a static.*fixes the batch size"):
        target.measure_graph(model, examples)
