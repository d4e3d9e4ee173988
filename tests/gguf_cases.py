"""Models with tokenizers that llama.cpp knows, small enough to be written in a moment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pico
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hawqkit.formats import GGUF, format_names
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.records import Allocation, Certificate, Totals

TYPES = tuple(name for name in format_names(GGUF) if name != "none")
ROWS = 320
TEXT = (
    "The quick brown fox jumps over the lazy dog. Whales, ships and the sea: Ishmael went aboard "
    "in 1851, with 3 friends and 42 harpoons. It's cold; they're not there, I'll wait! "
    "Über Größe, naïve café, 日本語 and emoji 🙂. Tabs\tand\nnewlines   too.\n"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_bpe(split: str = "gpt-2", *, bos: bool = False, template: str | None = None) -> Any:
    """Return a byte-level BPE tokenizer, its text split as llama.cpp calls it."""
    inner = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = LLAMA3 if split == "llama-bpe" else LLAMA3.replace("{1,3}", "")
    inner.pre_tokenizer = {
        "gpt-2": own,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own]),
    }.get(
        split,
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain]),
    )
    inner.decoder = decoders.ByteLevel()
    if split == "qwen2":
        inner.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 4,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 4, trainer)
    return _fast(inner, bos, template)


def sentence_bpe(*, prefix: bool = True) -> Any:
    """Return a BPE tokenizer of SentencePiece's kind: spaces as U+2581, a token for every byte."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{b:02X}>": b + 3 for b in range(256)}
    base = Tokenizer(models.BPE())
    base.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    base.train_from_iterator(TEXT.split("."), trainer)
    trained = json.loads(base.to_str())["model"]
    letters = [t for t in trained["vocab"] if len(t) == 1]
    merges = [tuple(m) for m in trained["merges"]]
    for text in [*letters, *(a + b for a, b in merges)]:
        vocabulary.setdefault(text, len(vocabulary))
    inner = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    prepend = [normalizers.Prepend("\u2581")] if prefix else []
    inner.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _fast(inner: Tokenizer, bos: bool, template: str | None) -> Any:
    if bos:
        inner.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = template
    return fast


def llama(tokenizer: Any = "default", **options: Any) -> LoadedModel:
    """Return a Llama of two layers whose columns fit every GGUF type, with a tokenizer."""
    options = {"hidden": 256, "intermediate": 512, "vocabulary": ROWS, **options}
    module: LlamaForCausalLM = pico.llama(**options)
    return wrap_model(
        module, name="pico", tokenizer=byte_bpe() if tokenizer == "default" else tokenizer
    )


def qwen2() -> LoadedModel:
    """Return a Qwen2: biases of q, k and v, a tied embedding."""
    config = Qwen2Config(**_sizes(), tie_word_embeddings=True)
    return _wrapped(Qwen2ForCausalLM(config), byte_bpe("qwen2"))


def qwen3() -> LoadedModel:
    """Return a Qwen3: norms of q and k, heads that are wider than hidden / heads."""
    config = Qwen3Config(**_sizes(), head_dim=128, tie_word_embeddings=False)
    return _wrapped(Qwen3ForCausalLM(config), byte_bpe("qwen2"))


def mistral() -> LoadedModel:
    """Return a Mistral with a window and a tokenizer of SentencePiece's kind."""
    config = MistralConfig(**_sizes(), sliding_window=128)
    return _wrapped(MistralForCausalLM(config), sentence_bpe())


def llama3() -> LoadedModel:
    """Return a Llama whose slow waves are made slower, as Llama 3.1 has them."""
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = LlamaConfig(**_sizes(), rope_parameters=rope, attention_bias=True)
    return _wrapped(LlamaForCausalLM(config), byte_bpe("llama-bpe", bos=True))


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": ROWS,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 2,
        "attn_implementation": "eager",
    }


def _wrapped(module: Any, tokenizer: Any) -> LoadedModel:
    pico.fill(module.to(torch.float32), 1)
    return wrap_model(module.eval(), name="pico", tokenizer=tokenizer)


def allocation(mix: Mapping[str, str], rounding: str = "searched") -> Allocation:
    proof = Certificate("test", "optimal", 0.0, 0.0, 0.0, len(mix), len(mix))
    return Allocation(
        layers=dict(mix), budgets={"average_bits": 4.0}, totals=Totals(4.0, 4.25, {"gguf": 1}),
        runtime="llama.cpp", score="trace", risk=0.0, objective=0.0, certificate=proof,
        rounding=rounding,
    )  # fmt: skip


def every_type(model: LoadedModel) -> dict[str, str]:
    """Give the layers all types in turn, and keep one of them."""
    choices = [*TYPES, "none"]
    return {layer.name: choices[i % len(choices)] for i, layer in enumerate(model.layers)}


def types_in(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def decoded(tensor: Any) -> np.ndarray:
    """Return a tensor of a file in float32, bfloat16 too."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        halves = np.ascontiguousarray(tensor.data).view(np.uint16).astype(np.uint32) << 16
        return halves.view(np.float32).reshape([int(n) for n in reversed(tensor.shape)])
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def turned_back(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo the order of rotary rows: feature 2i of a head is i again, 2i + 1 is d/2 + i."""
    d = rows.shape[0] // heads
    places = [h * d + 2 * (j % (d // 2)) + j // (d // 2) for h in range(heads) for j in range(d)]
    return rows[places]


MODELS = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "mistral": mistral, "llama3": llama3}
