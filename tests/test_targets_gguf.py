from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import gguf_cases as cases
import numpy as np
import pytest
import torch
from gguf_cases import TYPES, allocation, decoded, every_type, total_bytes, turned_back, types_in
from transformers import AutoModelForCausalLM, AutoTokenizer

from hawqkit.errors import Unsupported
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.apply import applied
from hawqkit.records import ModelFacts, Tensor
from hawqkit.targets import gguf as target
from hawqkit.targets import gguf_names
from hawqkit.targets.gguf_metadata import rope_factors


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return target.measure_gguf(cases.llama())


@pytest.mark.parametrize("name", cases.MODELS)
def test_every_tensor_of_a_model_has_one_name_and_every_layer_its_tensor(name: str) -> None:
    model = cases.MODELS[name]()
    names = gguf_names.tensor_names(model.facts)
    assert set(names) == {tensor.name for tensor in model.facts.tensors}
    assert len(set(names.values())) == len(names)
    assert all(set(n) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.") for n in names.values())
    placed = gguf_names.layer_tensors(model.layers, names)
    assert list(placed) == [layer.name for layer in model.layers]
    assert placed["model.layers.1.self_attn.o_proj"] == "blk.1.attn_output.weight"
    assert placed["model.embed_tokens"] == "token_embd.weight"
    tied = bool(model.facts.config["tie_word_embeddings"])
    assert ("output.weight" in placed.values()) != tied


def test_many_blocks_keep_their_numbers() -> None:
    tensors = tuple(
        Tensor(f"model.layers.{b}.mlp.{p}_proj.weight", "bfloat16", (8, 8))
        for b in range(40)
        for p in ("up", "gate", "down")
    )
    config = {"model_type": "llama", "num_hidden_layers": 40}
    facts = ModelFacts("m", "", "LlamaForCausalLM", 0, "bfloat16", tensors, config)
    names = gguf_names.tensor_names(facts)
    for block in range(40):
        for part in ("up", "gate", "down"):
            ours = f"model.layers.{block}.mlp.{part}_proj.weight"
            assert names[ours] == f"blk.{block}.ffn_{part}.weight"


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_interleaving_is_undone_by_the_rule_of_rotary_features(heads: int) -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((heads * 12, 7))
    turned = gguf_names.interleave(rows, heads)
    assert np.array_equal(turned_back(turned, heads), rows)
    # pairs that transformers turns together, i and i + d/2, are neighbors in the file
    assert np.array_equal(turned[0], rows[0])
    assert np.array_equal(turned[1], rows[6])


@pytest.mark.parametrize("name", cases.MODELS)
def test_every_tensor_comes_out_in_its_type_with_the_values_that_were_measured(
    name: str, tmp_path: Path
) -> None:
    model = target.measure_gguf(cases.MODELS[name]())
    mix = every_type(model)
    files = target.write(allocation(mix), tmp_path / "out", model)
    assert [path.name for path in files] == ["model.gguf", "quantization.json", "README.md"]
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    assert total_bytes(tmp_path / "out") == target.size(mix, model.layers, model.facts)

    names = gguf_names.tensor_names(model.facts)
    tensors = {t.name: t for t in gguf.GGUFReader(files[0]).tensors}
    config = model.facts.config
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    with applied(model, mix):
        for ours, weight in model.module.state_dict().items():
            if ours not in names:
                assert ours == "lm_head.weight"  # tied
                continue
            theirs = decoded(tensors.pop(names[ours]))
            part = names[ours].split(".")[-2]
            if name not in ("qwen2", "qwen3") and part in heads:
                theirs = turned_back(theirs, heads[part])
            assert np.array_equal(theirs.reshape(weight.shape), weight.numpy()), ours
    assert set(tensors) == ({"rope_freqs.weight"} if name == "llama3" else set())

    wanted = {layer: mix[layer] for layer in mix if mix[layer] != "none"}
    found = types_in(files[0])
    placed = gguf_names.layer_tensors(model.layers, names)
    assert {layer: found[placed[layer]] for layer in wanted} == wanted
    assert {t for n, t in found.items() if n.endswith("_norm.weight") or "bias" in n} == {"f32"}


def test_llama_3_slows_the_waves_that_transformers_slows() -> None:
    model = cases.llama3()
    factors = rope_factors(model.facts)
    assert factors is not None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](model.module.config, torch.device("cpu"))
    plain = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    np.testing.assert_allclose(factors, (plain / slowed.double()).numpy(), rtol=1e-5)
    assert factors.min() == 1
    assert factors.max() == 4
    assert rope_factors(cases.llama().facts) is None


def test_stored_dtypes_are_kept_where_the_mix_keeps_a_layer(tmp_path: Path) -> None:
    for dtype, kind in (("bfloat16", "bf16"), ("float16", "f16")):
        model = cases.llama(dtype=getattr(torch, dtype))
        model = target.measure_gguf(model)
        files = target.write(allocation({}), tmp_path / dtype, model)
        assert total_bytes(tmp_path / dtype) == target.size({}, model.layers, model.facts)
        found = types_in(files[0])
        assert found["blk.0.attn_q.weight"] == kind
        assert found["blk.0.attn_norm.weight"] == "f32"
        tensors = {t.name: t for t in gguf.GGUFReader(files[0]).tensors}
        weight = model.module.model.layers[1].mlp.up_proj.weight
        assert np.array_equal(decoded(tensors["blk.1.ffn_up.weight"]), weight.float().numpy())
        file_type = gguf.GGUFReader(files[0]).get_field("general.file_type").contents()
        assert file_type == {"bf16": 32, "f16": 1}[kind]


def test_sizes_of_all_mixes_are_sums_of_a_table(llama: LoadedModel, tmp_path: Path) -> None:
    layers, facts = llama.layers, llama.facts
    costs, fixed = target.size_table(layers, ["none", *TYPES, "int4-g64"], facts)
    assert costs[0, -1] == 0  # an integer format has no place in the file
    rng = np.random.default_rng(0)
    for _ in range(5):
        choice = rng.integers(len(TYPES) + 1, size=len(layers))
        mix = {x.name: ["none", *TYPES][c] for x, c in zip(layers, choice, strict=True)}
        summed = fixed + costs[np.arange(len(layers)), choice].sum()
        exact = target.size(mix, layers, facts)
        assert abs(summed - exact) < 500  # lines of the README's table
        assert abs(summed - exact) < 1e-3 * exact
    assert fixed + costs[:, 0].sum() == target.size({}, layers, facts)


def test_facts_hold_the_layout_and_survive_json(llama: LoadedModel) -> None:
    facts = replace(llama.facts, gguf=json.loads(json.dumps(llama.facts.gguf)))
    mix = every_type(llama)
    assert target.size(mix, llama.layers, facts) == target.size(mix, llama.layers, llama.facts)
    bare = replace(llama.facts, gguf={})
    with pytest.raises(Unsupported, match=r"call measure_gguf\(model\)"):
        target.size(mix, llama.layers, bare)
    with pytest.raises(Unsupported, match="measure_gguf"):
        target.size_table(llama.layers, TYPES, bare)


def test_metadata_says_what_the_configuration_says(llama: LoadedModel, tmp_path: Path) -> None:
    mix = {layer.name: "q4_k" for layer in llama.layers}
    path = target.write(allocation(mix), tmp_path / "out", llama)[0]
    fields = gguf.GGUFReader(path).fields
    found = {name: field.contents() for name, field in fields.items() if name[:5] != "token"}
    assert found["general.architecture"] == "llama"
    assert found["general.file_type"] == 15
    assert found["general.quantization_version"] == 2
    config = llama.facts.config
    for key, value in {
        "block_count": 2, "context_length": 256, "embedding_length": 256, "vocab_size": cases.ROWS,
        "feed_forward_length": 512, "attention.head_count": 4, "attention.head_count_kv": 2,
        "rope.dimension_count": 64, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": np.float32(config["rms_norm_eps"]),
    }.items():  # fmt: skip
        assert found[f"llama.{key}"] == value, key
    assert json.loads((path.parent / "quantization.json").read_text())["layers"] == mix
    assert "| q4_k | 16 |" in (path.parent / "README.md").read_text()


def test_a_window_that_llama_cpp_does_not_keep_is_said(tmp_path: Path) -> None:
    model = target.measure_gguf(cases.mistral())
    target.write(allocation({}), tmp_path / "out", model)
    assert "attends to 128 tokens" in (tmp_path / "out" / "README.md").read_text()


def test_transformers_reads_the_file_back(llama: LoadedModel, tmp_path: Path) -> None:
    """An independent reader, which turns rows back and dequantizes with gguf-py."""
    mix = every_type(llama)
    files = target.write(allocation(mix), tmp_path / "out", llama)
    where = {"pretrained_model_name_or_path": str(tmp_path / "out"), "gguf_file": files[0].name}
    module = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokens = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), applied(llama, mix):
        ours = llama.module(input_ids=tokens).logits
        theirs = module(input_ids=tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    again = AutoTokenizer.from_pretrained(**where)
    assert again(cases.TEXT)["input_ids"] == llama.tokenizer(cases.TEXT)["input_ids"]
