from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import gguf_cases as cases
import numpy as np
import pico
import pytest
import torch
from gguf_cases import allocation, decoded, total_bytes, turned_back, types_in

from hawqkit.errors import InputError, Unsupported
from hawqkit.models.loading import load_model
from hawqkit.quantize.apply import applied
from hawqkit.targets import gguf as target
from hawqkit.targets import gguf_writer
from hawqkit.targets.gguf_vocabulary import vocabulary_of


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a GGUF file with tensors in float32, q8_0 and q4_1, and a key of somebody else."""
    folder = tmp_path_factory.mktemp("original")
    model = cases.llama(tokenizer=cases.byte_bpe(template="{{ messages }}"))
    mix = {layer.name: "q8_0" for layer in model.layers if "mlp" in layer.name}
    mix |= {"model.layers.0.self_attn.k_proj": "q4_1", "lm_head": "q6_k"}
    path = folder / "source.gguf"
    gguf_writer.write_file(path, model, mix, rounding="nearest", version="0")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(folder / "with-more.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_string("somebody.note", "ünïcode\n🙂")
    writer.add_array("somebody.numbers", [1, 2, 3])
    writer.add_custom_alignment(64)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.unlink()
    return folder / "with-more.gguf"


def test_a_file_keeps_its_keys_and_the_tensors_that_the_mix_does_not_name(
    original: Path, cache: Path, tmp_path: Path
) -> None:
    model = target.measure_gguf(load_model(original))
    mix = {"model.layers.0.self_attn.q_proj": "q4_k", "model.layers.1.mlp.down_proj": "q3_k"}
    files = target.write(allocation(mix), tmp_path / "out", model)
    assert total_bytes(tmp_path / "out") == target.size(mix, model.layers, model.facts)
    before, after = gguf.GGUFReader(original), gguf.GGUFReader(files[0])
    assert after.alignment == 64
    old = {name: field.contents() for name, field in before.fields.items()}
    new = {name: field.contents() for name, field in after.fields.items()}
    assert set(new) == set(old)
    changed = {name for name in old if old[name] != new[name]}
    assert changed <= {"general.file_type", "hawqkit.version"}
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    replaced = {"blk.0.attn_q.weight": "q4_k", "blk.1.ffn_down.weight": "q3_k"}
    for old_tensor, new_tensor in zip(before.tensors, after.tensors, strict=True):
        if new_tensor.name in replaced:
            assert new_tensor.tensor_type.name.lower() == replaced[new_tensor.name]
        else:
            assert new_tensor.tensor_type == old_tensor.tensor_type
            assert np.array_equal(new_tensor.data, old_tensor.data), new_tensor.name
    with applied(model, mix):
        down = model.weight("model.layers.1.mlp.down_proj").numpy()
    (written,) = [t for t in after.tensors if t.name == "blk.1.ffn_down.weight"]
    assert np.array_equal(decoded(written), down)


def test_nothing_changed_gives_the_same_tensors_and_the_type_none_means_the_file_s(
    original: Path, cache: Path, tmp_path: Path
) -> None:
    model = target.measure_gguf(load_model(original))
    costs, _ = target.size_table(model.layers, ["none", "q8_0", "q4_1"], model.facts)
    rows = [layer.name for layer in model.layers]
    up = rows.index("model.layers.0.mlp.up_proj")
    assert costs[up, 0] == costs[up, 1]  # q8_0 already
    key = rows.index("model.layers.0.self_attn.k_proj")
    assert costs[key, 0] == costs[key, 2]
    files = target.write(allocation({}), tmp_path / "out", model)
    assert types_in(files[0]) == types_in(original)


def test_a_model_that_was_tuned_is_written_with_its_own_values(
    original: Path, cache: Path, tmp_path: Path
) -> None:
    model = target.measure_gguf(load_model(original))
    with torch.no_grad():
        model.module.model.layers[0].mlp.up_proj.weight.mul_(1.5)  # stored as q8_0
        model.module.model.layers[1].self_attn.q_proj.weight.mul_(0.5)  # stored as float32
        model.module.model.norm.weight.add_(0.25)
    files = target.write(allocation({}), tmp_path / "out", model)
    assert total_bytes(tmp_path / "out") == target.size({}, model.layers, model.facts)
    assert types_in(files[0]) == types_in(original)
    tensors = {t.name: decoded(t) for t in gguf.GGUFReader(files[0]).tensors}
    up = model.module.model.layers[0].mlp.up_proj.weight.numpy()
    assert np.abs(tensors["blk.0.ffn_up.weight"] - up).max() <= np.abs(up).max() / 127
    query = model.module.model.layers[1].self_attn.q_proj.weight.numpy()
    assert np.array_equal(turned_back(tensors["blk.1.attn_q.weight"], 4), query)
    assert np.array_equal(tensors["output_norm.weight"], model.module.model.norm.weight.numpy())


def test_a_file_that_is_gone_or_is_a_part_is_refused(
    original: Path, cache: Path, tmp_path: Path
) -> None:
    model = load_model(original)
    gone = replace(model, facts=replace(model.facts, source=str(tmp_path / "gone.gguf")))
    with pytest.raises(InputError, match=r"gone\.gguf"):
        target.measure_gguf(gone)
    other = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part = replace(model, facts=replace(model.facts, source=str(other)))
    with pytest.raises(Unsupported, match="one of 3 parts"):
        target.measure_gguf(part)


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_way_in_which_text_is_split_gets_llama_cpp_s_name(split: str) -> None:
    tokenizer = cases.byte_bpe(split, bos=True, template="{{ x }}")
    found = vocabulary_of(tokenizer, cases.ROWS, {})
    assert (found.model, found.split) == ("gpt2", split)
    assert len(found.tokens) == len(found.kinds) == cases.ROWS
    assert list(found.tokens[: len(tokenizer)]) == tokenizer.convert_ids_to_tokens(
        list(range(len(tokenizer)))
    )
    kinds = gguf.TokenType
    assert set(found.kinds[:3]) == {kinds.CONTROL}
    assert set(found.kinds[len(tokenizer) :]) == {kinds.UNUSED}
    assert found.adds == {"bos": True, "eos": False}
    assert found.ids == {"bos": 1, "eos": 0, "pad": 2}
    assert found.chat_template == "{{ x }}"
    merged = [tuple(m.split(" ")) for m in found.merges]
    trained = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert merged == [tuple(m) for m in trained]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_s_kind_gets_scores_in_the_order_of_its_merges(prefix: bool) -> None:
    tokenizer = cases.sentence_bpe(prefix=prefix)
    found = vocabulary_of(tokenizer, cases.ROWS, {})
    assert (found.model, found.merges, found.space_prefix) == ("llama", (), prefix)
    kinds = gguf.TokenType
    assert found.kinds[:3] == (kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL)
    assert set(found.kinds[3:259]) == {kinds.BYTE}
    trained = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    numbers = [tokenizer.convert_tokens_to_ids(a + b) for a, b in trained]
    scores = [found.scores[n] for n in dict.fromkeys(numbers)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


def test_a_model_without_a_tokenizer_takes_numbers(tmp_path: Path) -> None:
    model = target.measure_gguf(cases.llama(tokenizer=None))
    path = target.write(allocation({}), tmp_path / "out", model)[0]
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.model"].contents() == "none"
    assert not [name for name in fields if name.startswith("tokenizer.ggml.t")]


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_with_what_is_missing() -> None:
    from tokenizers import pre_tokenizers

    with pytest.raises(Unsupported, match=r"its model is WordLevel.*tokenizer=None"):
        target.measure_gguf(cases.llama(tokenizer=pico.tokenizer()))
    odd = cases.byte_bpe()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(Unsupported, match=r"split before merging by .*Whitespace"):
        vocabulary_of(odd, cases.ROWS, {})
    spaced = cases.byte_bpe()
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(Unsupported, match="add_prefix_space"):
        vocabulary_of(spaced, cases.ROWS, {})
    with pytest.raises(Unsupported, match="the embedding 100 rows"):
        vocabulary_of(cases.byte_bpe(), 100, {})
