"""Names of modules and names of tensors in a GGUF file: which is which, and how rows are ordered.

    model.layers.0.self_attn.q_proj  <->  blk.0.attn_q.weight

The table is gguf-py's `TensorNameMap`, the one of llama.cpp's own converter. What a family does
beside renaming stands in `FAMILIES`: models of the architecture `llama` turn pairs of features that
lie beside each other, where transformers turns halves of a head, so rows of q and k are reordered.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hawqkit.errors import Unsupported
from hawqkit.records import Layer, ModelFacts

INSTALL = "pip install 'hawqkit[gguf]'"
SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True, slots=True)
class Family:
    """How models of one `model_type` are stored.

    Attributes:
        architecture: llama.cpp's name.
        interleaved: whether rows of q and k are reordered, see `interleave`.
    """

    architecture: str
    interleaved: bool = False


# `model_type` of transformers -> family of which whole files can be written.
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
}

# `model_type`s that llama.cpp calls otherwise; the names of all others are tried as they are.
_OTHER_NAMES = {
    "mistral": "llama",
    "gpt_neox": "gptneox",
    "phi": "phi2",
    "gemma3_text": "gemma3",
    "gpt_bigcode": "starcoder",
    "cohere": "command-r",
}


def require_gguf(what: str) -> Any:
    """Return the package `gguf`.

    Raises:
        Unsupported: it is not installed; the message names the line that installs it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise Unsupported(f"{what} needs the package gguf; install it with `{INSTALL}`.")
    return importlib.import_module("gguf")


def architecture_of(facts: ModelFacts) -> str | None:
    """Return what llama.cpp calls a model's architecture, None if it has none of that name.

    Raises:
        Unsupported: the package `gguf` is missing.
    """
    gguf = require_gguf("knowing names of GGUF tensors")
    kind = str(facts.config.get("model_type") or "")
    name = _OTHER_NAMES.get(kind, kind.replace("_", "-"))
    known = set(gguf.MODEL_ARCH_NAMES.values())
    return next((n for n in (name, kind) if n in known), None)


def name_map(architecture: str, blocks: int) -> dict[str, str]:
    """Return names of modules -> names of tensors without `.weight`, every alias that is known.

    Args:
        architecture: llama.cpp's name, `llama`.
        blocks: transformer blocks of the model.
    """
    gguf = require_gguf("knowing names of GGUF tensors")
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    mapping = gguf.get_tensor_name_map(kind, blocks).mapping
    return {module: tensor for module, (_, tensor) in mapping.items()}


def tensor_names(facts: ModelFacts) -> dict[str, str]:
    """Return name of a stored tensor -> its name in a GGUF file, for all that have one.

    A name that llama.cpp does not know is left out.

    Raises:
        Unsupported: the package `gguf` is missing.
    """
    architecture = architecture_of(facts)
    if architecture is None:
        return {}
    known = name_map(architecture, blocks_of(facts))
    found = {}
    for tensor in facts.tensors:
        owner, dot, leaf = tensor.name.rpartition(".")
        if owner in known and dot + leaf in SUFFIXES:
            found[tensor.name] = known[owner] + dot + leaf
    return found


def blocks_of(facts: ModelFacts) -> int:
    """Return the number of transformer blocks, from the configuration."""
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if isinstance(facts.config.get(key), int):
            return int(facts.config[key])
    return 0


def layer_tensors(layers: Sequence[Layer], names: Mapping[str, str]) -> dict[str, str]:
    """Return layer name -> name of its tensor, for the layers that have one.

    A weight with several uses is stored under one of their names.

    Args:
        layers: of the model.
        names: of `tensor_names`.
    """
    found = {}
    for layer in layers:
        uses = (f"{name}.weight" for name in (layer.name, *layer.tied))
        tensor = next((names[use] for use in uses if use in names), None)
        if tensor is not None:
            found[layer.name] = tensor
    return found


def interleave(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Return rows of q or k in the order in which GGUF files of the architecture `llama` have them.

    transformers turns feature i of a head with feature i + d/2, llama.cpp feature 2i with 2i + 1:
    row j of a head, j = 0 .. d-1, comes from row (j % 2) d/2 + j // 2.

    Args:
        rows: (heads d, ...), of any dtype: weights, bytes of blocks, or a bias.
        heads: of q, or key-value heads.

    >>> interleave(np.arange(8), 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def rotated_heads(name: str, facts: ModelFacts) -> int | None:
    """Return the heads of a tensor whose rows are reordered, None for all others.

    Args:
        name: in the GGUF file.
        facts: of the model.

    >>> facts = ModelFacts("m", "", "LlamaForCausalLM", 0, "float32", config={
    ...     "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2})
    >>> rotated_heads("blk.0.attn_k.weight", facts), rotated_heads("blk.0.attn_v.weight", facts)
    (2, None)
    """
    family = FAMILIES.get(str(facts.config.get("model_type")))
    part = name.split(".")[-2] if "." in name else ""
    if family is None or not family.interleaved or part not in ("attn_q", "attn_k"):
        return None
    heads = int(facts.config["num_attention_heads"])
    return heads if part == "attn_q" else int(facts.config.get("num_key_value_heads") or heads)
