"""What a GGUF file says of a model beside its weights, from a transformers configuration.

Keys and rules are those of llama.cpp's `convert_hf_to_gguf.py` for the families of `gguf_names`.
What a configuration asks for and llama.cpp does not do is refused: see `configuration_problems`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hawqkit.records import ModelFacts
from hawqkit.targets.gguf_names import FAMILIES, require_gguf

ROPE_FREQUENCIES = "rope_freqs.weight"
_ROPES = ("default", "linear", "llama3", "yarn")


def configuration_problems(facts: ModelFacts) -> list[str]:
    """Return what keeps a model from being written as a whole file, whatever the mix."""
    what = f"model {facts.source!r}: "
    config = facts.config
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        problem = (
            f"{what}models of type {kind!r} are not written as GGUF files; known are {known}. "
            "Convert it with llama.cpp's convert_hf_to_gguf.py and export 'llama-quantize'."
        )
        return [problem]
    found = []
    rope = _rope(config)
    if rope.get("rope_type", "default") not in _ROPES:
        found.append(
            f"{what}its rotary embedding is {rope.get('rope_type')!r}; known are "
            f"{', '.join(_ROPES)}."
        )
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        found.append(f"{what}it turns a part of each head alone, and llama.cpp turns all of it.")
    if config.get("hidden_act", "silu") != "silu":
        found.append(
            f"{what}its activation is {config['hidden_act']!r}, and llama.cpp computes 'silu' for "
            "this architecture."
        )
    odd = sorted({t.dtype for t in facts.tensors} - {"float32", "float16", "bfloat16"})
    if odd:
        found.append(
            f"{what}weights of dtype {', '.join(odd)} have no place in a GGUF file; load it with "
            "dtype='float32'."
        )
    return found


def notes(facts: ModelFacts) -> list[str]:
    """Return sentences for the README: where llama.cpp computes otherwise than transformers."""
    window = facts.config.get("sliding_window")
    if window and facts.config.get("use_sliding_window", True):
        note = (
            f"The model attends to {window} tokens; llama.cpp does not limit this architecture, so "
            "longer texts are read otherwise than by transformers."
        )
        return [note]
    return []


def add_model(writer: Any, facts: ModelFacts, rows: int) -> None:
    """Put name, sizes and rotary embedding into a gguf-py `GGUFWriter`.

    Args:
        writer: of the architecture.
        facts: of the model.
        rows: of the embedding.
    """
    gguf = require_gguf("writing a GGUF file")
    config = facts.config
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(facts.source.rstrip("/").rsplit("/", 1)[-1])
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(rows)
    writer.add_rope_dimension_count(head)
    _add_rope(writer, _rope(config), gguf.RopeScalingType)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding as transformers 5 writes it, from older configurations too."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def _add_rope(writer: Any, rope: Mapping[str, Any], scaling: Any) -> None:
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(getattr(scaling, rope["rope_type"].upper()))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "linear":
        return
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    for key, add in (
        ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
        ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
    ):
        if rope.get(key) is not None:
            add(float(rope[key]))


def rope_factors(facts: ModelFacts) -> npt.NDArray[np.float32] | None:
    """Return what Llama 3 divides its frequencies by, (head / 2,), None for all other models.

    With L the original context length, a wave of length w = 2 pi base^(2i / d) keeps its frequency
    where w < L / high, is `factor` times slower where w > L / low, and between them

        1 / ((1 - s) / factor + s),   s = (L / w - low) / (high - low)

    Source: `_compute_llama3_parameters` of transformers; `generate_extra_tensors` of llama.cpp.
    """
    rope = _rope(facts.config)
    if rope["rope_type"] != "llama3":
        return None
    heads = int(facts.config["num_attention_heads"])
    head = int(facts.config.get("head_dim") or facts.config["hidden_size"] // heads)
    factor, low, high = (
        float(rope.get(key, default))
        for key, default in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    length = float(rope.get("original_max_position_embeddings", 8192))
    exponents = np.arange(0, head, 2, dtype=np.float32) / head
    waves = 2 * math.pi * float(rope["rope_theta"]) ** exponents.astype(np.float64)
    smooth = (length / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(waves < length / high, 1.0, np.where(waves > length / low, factor, between))
    return factors.astype(np.float32)
