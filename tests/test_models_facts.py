from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
from safetensors import safe_open
from torch import nn

from hawqkit.errors import NumericalError
from hawqkit.models.model import wrap_model
from hawqkit.records import Tensor

MODELS = {
    "llama": pico.llama,
    "llama-tied": lambda: pico.llama(tied=True),
    "llama-bf16": lambda: pico.llama(dtype=torch.bfloat16),
    "gpt2": pico.gpt2,
    "mixtral": pico.mixtral,
}


@pytest.mark.parametrize("name", MODELS)
def test_facts_list_the_tensors_that_save_pretrained_writes(name, tmp_path):
    module = MODELS[name]()
    facts = wrap_model(module, name=name).facts
    module.save_pretrained(tmp_path)
    kinds = {"F32": "float32", "BF16": "bfloat16"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        views = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        written = {
            Tensor(key, kinds[view.get_dtype()], tuple(view.get_shape()))
            for key, view in views.items()
        }
    assert set(facts.tensors) == written
    assert len(facts.tensors) == len(written)
    assert facts.parameters == sum(p.numel() for p in module.parameters())


def test_side_files_are_the_bytes_that_saving_writes(tmp_path):
    model = wrap_model(pico.llama(), name="pico", tokenizer=pico.tokenizer())
    written = model.save_side_files(tmp_path)
    sizes = {p.name: p.stat().st_size for p in Path(tmp_path).iterdir()}
    assert written == sizes == model.facts.side_files
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(sizes)
    again = tmp_path / "again"
    model.save_side_files(again)
    for name in sizes:
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_wrapping_freezes_the_model_and_turns_the_cache_off_but_records_its_setting():
    model = wrap_model(pico.llama().train(), name="pico")
    assert not model.module.training
    assert not any(p.requires_grad for p in model.module.parameters())
    assert model.module.config.use_cache is False
    assert model.facts.config["use_cache"] is True
    assert model.device == torch.device("cpu")


def test_config_is_plain_json_and_knows_no_folder(tmp_path):
    module = pico.llama(dtype=torch.bfloat16)
    module.config._name_or_path = str(tmp_path)
    config = wrap_model(module, name="pico").facts.config
    assert json.loads(json.dumps(config)) == config
    assert str(tmp_path) not in json.dumps(config)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"


def test_plain_modules_have_facts_too():
    facts = wrap_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), name="net").facts
    assert (facts.source, facts.architecture, facts.parameters) == ("net", "Sequential", 58)
    assert facts.config == {}
    assert facts.side_files == {}
    assert [t.name for t in facts.tensors] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_hash_sees_values_names_shapes_and_dtypes_and_nothing_else():
    reference = wrap_model(pico.llama(), name="a").facts.hash
    assert wrap_model(pico.llama(attention="sdpa"), name="b").facts.hash == reference
    changed = pico.llama()
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-6
    others = {
        wrap_model(changed, name="a").facts.hash,
        wrap_model(pico.llama(dtype=torch.float64), name="a").facts.hash,
        wrap_model(pico.llama(tied=True), name="a").facts.hash,
        wrap_model(pico.llama(seed=1), name="a").facts.hash,
    }
    assert reference not in others
    assert len(others) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    module = pico.llama()
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(NumericalError, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj"):
        wrap_model(module, name="pico")


def test_pico_models_are_the_same_for_a_seed():
    first, second = pico.llama(seed=4), pico.llama(seed=4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.lm_head.weight, pico.llama(seed=5).lm_head.weight)
