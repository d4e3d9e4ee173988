from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import gguf_cases as cases
import pico
import pytest
import torch
from gguf_cases import TYPES, allocation, every_type, total_bytes, types_in

from hawqkit.errors import HawqkitError, InputError, NumericalError, Unsupported
from hawqkit.formats import parse_format
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.targets import Target, gguf_writer
from hawqkit.targets import gguf as target


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return target.measure_gguf(cases.llama())


def test_every_problem_is_listed_and_nothing_is_written(llama: LoadedModel, tmp_path: Path) -> None:
    mix = {
        "model.layers.0.mlp.up_proj": "int4-g64",
        "model.layers.0.mlp.gate_proj": "nf4-g64",
        "model.layers.7.mlp.up_proj": "q4_k",
        "lm_head": "w4a8",
        "model.layers.1.mlp.up_proj": "q9_k",
    }
    with pytest.raises(Unsupported, match="5 problems") as caught:
        target.write(allocation(mix), tmp_path / "out", llama)
    message = str(caught.value)
    for word in ("'int4-g64'", "'nf4-g64'", "layers.7", "'w4a8'", "q9_k", "these fit: iq4_xs"):
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_columns_that_blocks_do_not_fill_are_refused_with_what_fits() -> None:
    model = wrap_model(pico.llama(), name="pico", tokenizer=None)  # 64 and 128 columns
    found = target.problems({"model.layers.0.mlp.up_proj": "q4_k"}, model.layers, model.facts)
    assert len(found) == 1
    assert "does not fit its 64 columns, which 256 does not divide" in found[0]
    assert "these fit: iq4_nl, q4_0" in found[0]


def test_models_that_llama_cpp_computes_otherwise_are_refused() -> None:
    gpt2 = wrap_model(pico.gpt2(), name="gpt2")
    assert "models of type 'gpt2'" in target.problems({}, gpt2.layers, gpt2.facts)[0]
    llama = cases.llama()
    for change, word in (
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "a part"),
    ):
        facts = replace(llama.facts, config={**llama.facts.config, **change})
        (found,) = target.problems({}, llama.layers, facts)
        assert word in found
    wide = cases.llama(dtype=torch.float64)
    assert "float64" in target.problems({}, wide.layers, wide.facts)[0]
    assert "no transformers configuration" in target.problems(
        {}, llama.layers, replace(llama.facts, config={})
    )[0]  # fmt: skip


def test_a_weight_that_its_type_cannot_hold_names_its_layer(tmp_path: Path) -> None:
    model = target.measure_gguf(cases.llama())
    with torch.no_grad():
        model.module.model.layers[1].mlp.up_proj.weight[3, 5] = 1e30
    with pytest.raises(NumericalError, match=r"layer 'model\.layers\.1\.mlp\.up_proj'"):
        target.write(allocation({"model.layers.1.mlp.up_proj": "q4_k"}), tmp_path / "out", model)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_line_that_installs_it(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a)
    )
    with pytest.raises(Unsupported, match=r"pip install 'hawqkit\[gguf\]'"):
        target.measure_gguf(llama)


def test_hostile_names_and_sources_stay_inside_the_folder(tmp_path: Path) -> None:
    model = cases.llama()
    source = '../../evil\n`name`/"x"'
    model = target.measure_gguf(replace(model, facts=replace(model.facts, source=source)))
    target.write(allocation({}), tmp_path / "a" / "out", model)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "README.md", "a", "model.gguf", "out", "quantization.json",
    ]  # fmt: skip
    content = json.loads((tmp_path / "a" / "out" / "quantization.json").read_text())
    assert content["model"]["source"] == source
    assert total_bytes(tmp_path) == target.size({}, model.layers, model.facts)


def test_an_earlier_export_is_replaced_and_other_folders_are_not(
    llama: LoadedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    target.write(allocation(every_type(llama)), folder, llama)
    target.write(allocation({}), folder, llama)
    assert set(types_in(folder / "model.gguf").values()) == {"f32"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.gguf").write_bytes(b"years of work")
    with pytest.raises(InputError, match="no export of this target wrote"):
        target.write(allocation({}), tmp_path / "mine", llama)
    assert (tmp_path / "mine" / "model.gguf").read_bytes() == b"years of work"
    with pytest.raises(Unsupported, match="give the model"):
        target.write_from_facts(allocation({}), folder, llama.layers, llama.facts)


def test_a_failure_while_writing_leaves_the_earlier_export(
    llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.write(allocation({}), tmp_path / "out", llama)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    calls = []

    def full(self: object, tensor: object, *rest: object) -> None:
        calls.append(tensor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space left"):
        target.write(allocation(every_type(llama)), tmp_path / "out", llama)
    assert calls
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_that_reads_back_otherwise_is_not_published(
    llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gguf_writer.encode_blocks

    def other(weight: Any, format: Any, *, rounding: str) -> Any:
        return original(weight, parse_format("q8_0"), rounding=rounding)

    monkeypatch.setattr(gguf_writer, "encode_blocks", other)
    with pytest.raises((AssertionError, HawqkitError)):
        target.write(allocation({"lm_head": "q4_k"}), tmp_path / "out", llama)
    assert list(tmp_path.iterdir()) == []


def test_the_module_fulfills_the_contract(caplog: pytest.LogCaptureFixture) -> None:
    module: Target = target
    assert (module.NAME, module.SIZED, module.RUNTIMES) == ("gguf", True, ("llama.cpp",))
    assert set(module.capabilities().formats()) == {*TYPES, "none"}
    with caplog.at_level(logging.WARNING):
        target.measure_gguf(cases.llama())
    assert not caplog.messages
