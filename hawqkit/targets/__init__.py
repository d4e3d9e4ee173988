"""What quantizers read: one module a target, found in a lazy table. Nothing here imports torch."""

from __future__ import annotations

import importlib
from typing import cast

from hawqkit.errors import InputError, did_you_mean
from hawqkit.targets.contract import Target

# Name in a recipe -> module that fulfills `contract.Target`.
TARGETS: dict[str, str] = {
    "compressed-tensors": "hawqkit.targets.compressed_tensors",
    "bits": "hawqkit.targets.bits",
    "onnx": "hawqkit.targets.onnx",
    "gguf": "hawqkit.targets.gguf",
    "llama-quantize": "hawqkit.targets.llama_quantize",
    "llm-compressor": "hawqkit.targets.llm_compressor",
    "auto-round": "hawqkit.targets.auto_round",
    "gptqmodel": "hawqkit.targets.gptqmodel",
    "modelopt": "hawqkit.targets.modelopt",
    "neural-compressor": "hawqkit.targets.neural_compressor",
}

__all__ = ["TARGETS", "Target", "find_target"]


def find_target(name: str) -> Target:
    """Return the module of a target.

    Raises:
        InputError: there is none of that name.

    >>> find_target("bits").SIZED
    False
    """
    if name not in TARGETS:
        raise InputError(
            f"unknown target {name!r}: known are {', '.join(sorted(TARGETS))}."
            + did_you_mean(name, sorted(TARGETS))
        )
    return cast(Target, importlib.import_module(TARGETS[name]))
