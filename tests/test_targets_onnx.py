from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_cases as cases
import pytest
import torch
from torch import Tensor, nn

from hawqkit.errors import InputError
from hawqkit.formats import parse_format
from hawqkit.models.model import LoadedModel
from hawqkit.models.signature import with_inputs
from hawqkit.quantize.activations import calibrate_activations
from hawqkit.quantize.apply import applied
from hawqkit.records.activations import ActivationRanges
from hawqkit.targets import onnx as target
from hawqkit.targets import onnx_graph, onnx_writer
from hawqkit.targets.onnx_parts import Place, filled_bytes, parts
from hawqkit.targets.onnx_writer import write_folder

onnx = pytest.importorskip("onnx")  # what the target needs; an extra
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

Case = Callable[[], tuple[nn.Module, dict[str, Tensor]]]
WEIGHTS = (
    "int4-g32", "int8-channel", "int4-channel", "int8-g64-asym", "none", "int4-g64-asym",
    "int8-channel-asym", "int8-g32",
)  # fmt: skip
INPUTS = ("int8-channel-a8", "int4-channel-a8", "int8-channel-asym-a8", "none", "int4-g32-a8")
# Both sides compute in float32 and sum in other orders: a sum of n products is off by some
# sqrt(n) 6e-8 of its size, n up to 576 here, through at most 53 layers, which do not amplify it.
ROUNDING = 2e-5


@pytest.fixture(autouse=True, scope="module")
def one_export_a_network() -> Iterator[None]:
    """Tests of one network share its float graph: torch takes a second and more to make one."""
    real, made = onnx_graph.float_graph, {}

    def once(model: LoadedModel) -> tuple[Any, dict[str, Place]]:
        if id(model.module) not in made:
            made[id(model.module)] = (model.module, *real(model))
        _, graph, places = made[id(model.module)]
        copy = type(graph)()
        copy.CopyFrom(graph)
        return copy, dict(places)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "float_graph", once)
        patch.setattr(onnx_writer, "float_graph", once)
        yield


def mixed(model: LoadedModel, formats: tuple[str, ...]) -> dict[str, str]:
    """The formats in turn, each where it fits."""
    mix = {}
    for index, layer in enumerate(model.layers):
        fitting = [f for f in formats if parse_format(f).fits(layer.columns)]
        mix[layer.name] = fitting[index % len(fitting)]
    return mix


def difference(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def logits_of(model: LoadedModel, inputs: Mapping[str, Tensor]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        out = model.module(**inputs)
    found: np.ndarray[Any, Any] = getattr(out, "logits", out).numpy()
    return found


def written(
    folder: Path, case: tuple[nn.Module, dict[str, Tensor]], formats: tuple[str, ...]
) -> tuple[LoadedModel, dict[str, str], list[Path]]:
    model, examples = cases.loaded(*case)
    model = with_inputs(model, examples)
    mix = mixed(model, formats)
    return model, mix, target.write(cases.allocation(mix), folder, model)


@pytest.mark.parametrize(
    "case",
    [
        cases.cnn,
        cases.sequence_net,
        cases.bert,
        pytest.param(cases.resnet, marks=pytest.mark.targets),
        pytest.param(cases.vit, marks=pytest.mark.targets),
        pytest.param(cases.mobilenet, marks=pytest.mark.targets),
    ],
    ids=["cnn", "sequence_net", "bert", "resnet", "vit", "mobilenet"],
)
def test_onnx_runtime_computes_what_the_quantized_model_does_and_size_is_exact(
    tmp_path: Path, case: Case
) -> None:
    module, inputs = case()
    model, examples = cases.loaded(module, inputs)
    model = target.measure_graph(model, examples)
    mix = mixed(model, WEIGHTS)
    files = target.write(cases.allocation(mix), tmp_path / "out", model)
    assert sorted(p.name for p in files) == ["README.md", "model.onnx", "quantization.json"]
    # any number of examples, and any length of text
    shorter = {n: v[:1, :5] if v.dtype == torch.int64 else v[:1] for n, v in inputs.items()}
    path = tmp_path / "out" / "model.onnx"
    for feed in (inputs, shorter):
        with applied(model, mix):
            wanted = logits_of(model, feed)
        for optimize in (False, True):
            assert difference(cases.run_graph(path, feed, optimize=optimize), wanted) < ROUNDING
    total = sum(p.stat().st_size for p in files)
    assert target.size(mix, model.layers, model.facts) == total
    # the table adds up to it, but for the lines of the README
    costs, fixed = target.size_table(model.layers, WEIGHTS, model.facts)
    summed = fixed + sum(costs[i, WEIGHTS.index(mix[x.name])] for i, x in enumerate(model.layers))
    assert abs(summed - total) < 300


def test_every_weight_that_the_file_decodes_to_is_the_simulated_one_bit_for_bit(
    tmp_path: Path,
) -> None:
    case = cases.sequence_net()
    model, mix, _ = written(tmp_path / "out", case, ("int8-channel", "int4-channel-asym"))
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    names = [f"{layer.name}.weight" for layer in model.layers]
    assert not {t.name for t in proto.graph.initializer} & set(names)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    decoded = session.run(names, {"input": case[1]["input"].numpy()})
    with applied(model, mix):
        for layer, found in zip(model.layers, decoded, strict=True):
            own = model.parameter(layer.name).detach().numpy()
            # a Linear is stored as (inputs, outputs)
            np.testing.assert_array_equal(found, own.T if layer.kind == "linear" else own)


def test_codes_take_four_bits_or_eight_and_nothing_else_changes(tmp_path: Path) -> None:
    sizes = {}
    for name, kind in (("int8-channel", "INT8"), ("int4-channel", "INT4")):
        model, _, _ = written(tmp_path / name, cases.cnn(), (name,))
        proto = onnx.load(tmp_path / name / "model.onnx")
        number = onnx.TensorProto.DataType.Value(kind)
        codes = {t.name for t in proto.graph.initializer if t.data_type == number}
        assert codes == {f"{layer.name}.weight_codes" for layer in model.layers}
        sizes[name] = proto.ByteSize()
    entries = sum(layer.numel for layer in model.layers)
    # the lengths of five messages are written in one byte less, or not
    assert 0 <= sizes["int8-channel"] - sizes["int4-channel"] - entries // 2 <= 5


def simulated(
    model: LoadedModel,
    mix: Mapping[str, str],
    ranges: ActivationRanges,
    inputs: Mapping[str, Tensor],
) -> np.ndarray[Any, Any]:
    with applied(model, mix, activations=ranges):
        return logits_of(model, inputs)


@pytest.mark.parametrize(
    ("case", "formats"),
    [
        (cases.cnn, INPUTS),
        (cases.cnn, ("w8a8",)),
        (cases.bert, INPUTS),
        pytest.param(cases.bert, ("w8a8",), marks=pytest.mark.targets),
    ],
    ids=["cnn-mixed", "cnn-w8a8", "bert-mixed", "bert-w8a8"],
)
def test_quantized_inputs_are_rounded_as_the_simulation_does(
    tmp_path: Path, case: Case, formats: tuple[str, ...]
) -> None:
    module, inputs = case()
    model, examples = cases.loaded(module, inputs)
    model = target.measure_graph(model, examples)
    mix = mixed(model, formats)
    ranges = calibrate_activations(model, examples, model.layers, [8])
    wanted = simulated(model, mix, ranges, inputs)
    files = write_folder(cases.allocation(mix), tmp_path / "out", model, ranges)
    total = sum(p.stat().st_size for p in files)
    assert target.size(mix, model.layers, model.facts) == total
    for optimize in (False, True):
        found = cases.run_graph(tmp_path / "out" / "model.onnx", inputs, optimize=optimize)
        # An input that lies between two codes, up to float32 rounding, may get either: then it is
        # off by one of 255 steps, and logits by some of that, since many inputs make up one.
        assert difference(found, wanted) < 1 / 255
        assert np.median(np.abs(found - wanted)) < ROUNDING * np.abs(wanted).max()


def test_sums_of_large_products_do_not_saturate(tmp_path: Path) -> None:
    """Weights and inputs at the ends of their ranges: uint8 times int8 would overflow 16 bits."""
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
    )
    for parameter in net.parameters():
        parameter.data.fill_(0.01)
    inputs = {"input": torch.full((1, 8, 7, 7), 3.0)}
    model, examples = cases.loaded(net, inputs)
    model = with_inputs(model, examples)
    mix = {layer.name: "w8a8" for layer in model.layers}
    ranges = calibrate_activations(model, examples, model.layers, [8])
    wanted = simulated(model, mix, ranges, inputs)
    write_folder(cases.allocation(mix), tmp_path / "out", model, ranges)
    found = cases.run_graph(tmp_path / "out" / "model.onnx", inputs)
    # Biases of integer convolutions are rounded to the product of both scales by the runtime.
    assert difference(found, wanted) < 1e-3


class Tied(nn.Module):
    """A head that shares its weight with the embedding, and a branch that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 32)
        self.inner = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)
        self.head = nn.Linear(32, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.inner(self.embed(tokens))).mean(1)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["int4-g32", "int8-channel-asym"])
def test_tied_weights_are_stored_once_and_unreached_layers_not_at_all(
    tmp_path: Path, name: str
) -> None:
    net = cases.filled(Tied())
    inputs = {"tokens": torch.tensor([[1, 2, 3], [5, 0, 4]])}
    model, examples = cases.loaded(net, inputs)
    model = target.measure_graph(model, examples)
    mix = mixed(model, (name,))
    files = target.write(cases.allocation(mix), tmp_path / "out", model)
    assert {"embed", "inner", "unused"} == {layer.name for layer in model.layers}
    with applied(model, mix):
        wanted = logits_of(model, inputs)
    path = tmp_path / "out" / "model.onnx"
    assert difference(cases.run_graph(path, inputs), wanted) < ROUNDING
    stored = {t.name for t in onnx.load(path).graph.initializer}
    assert {n for n in stored if n.endswith("_codes")} == {
        "embed.weight_codes",
        "inner.weight_codes",
    }
    assert sum(p.stat().st_size for p in files) == target.size(mix, model.layers, model.facts)


def test_a_folder_of_somebody_else_stays_and_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    case = cases.tiny()
    with pytest.raises(InputError, match="no export of this target"):
        written(folder, case, ("int8-channel",))
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    written(folder, case, ("int8-channel",))
    first = (folder / "model.onnx").read_bytes()
    written(folder, case, ("int4-channel",))
    assert (folder / "model.onnx").read_bytes() != first


@pytest.mark.targets
def test_the_same_mix_gives_the_same_bytes_with_no_traces_of_the_machine(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        written(tmp_path / name, cases.tiny(), ("int4-g32",))
        files.append((tmp_path / name / "model.onnx").read_bytes())
    assert files[0] == files[1]
    assert b"site-packages" not in files[0]
    assert b"forward" not in files[0]


def test_the_formats_stand_beside_the_graph(tmp_path: Path) -> None:
    model, mix, _ = written(tmp_path / "out", cases.cnn(), ("int8-channel", "int4-channel"))
    found = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert (found["kind"], found["layers"]) == ("hawqkit-onnx", mix)
    assert found["model"]["hash"] == model.facts.hash
    text = (tmp_path / "out" / "README.md").read_text()
    assert "`image` (float32, examples x 2 x 8 x 8)" in text
    assert "| int4-channel | 2 |" in text


def test_a_model_in_another_dtype_is_exported_in_float32(tmp_path: Path) -> None:
    module, inputs = cases.cnn()
    wide_module = deepcopy(module).double()
    model, mix, _ = written(tmp_path / "out", (wide_module, inputs), ("int8-channel",))
    wide = {name: value.double() for name, value in inputs.items()}
    with applied(model, mix):
        wanted = logits_of(model, wide)
    found = cases.run_graph(tmp_path / "out" / "model.onnx", inputs)
    assert difference(found, wanted.astype(np.float32)) < ROUNDING


def test_bytes_of_empty_parts_are_those_of_filled_ones() -> None:
    rng = np.random.default_rng(0)
    from hawqkit.targets.onnx_parts import Codes

    for use, dims in (("columns", (64, 6)), ("rows", (6, 64)), ("conv", (6, 16, 2, 2))):
        place = Place("w.weight", use, dims, 1, ("t",), 0)
        for name in ("int4-g32-asym", "int8-channel-a8", "int4-channel", "int8-g64"):
            form = parse_format(name)
            groups = form.groups_per_row(64)
            scales = rng.standard_normal((6, groups)).astype(np.float32)
            zeros = None if form.symmetric else np.zeros((6, groups), dtype=np.int8)
            codes = Codes(rng.integers(-8, 8, (6, 64)).astype(np.int8), scales, zeros)
            full, nodes = parts(place, form, codes)
            empty, same = parts(place, form, None)
            assert [filled_bytes(t) for t in empty] == [t.ByteSize() for t in full]
            assert nodes == same
