"""What quantizers read: one module a target, found in a lazy table. Nothing here imports torch.

Targets of other packages are found by their entry points, see `plugins`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
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
    "torchao": "hawqkit.targets.torchao",
    "bitsandbytes": "hawqkit.targets.bitsandbytes",
    "mlx": "hawqkit.targets.mlx",
    "openvino": "hawqkit.targets.openvino",
    "hqq": "hawqkit.targets.hqq",
    "quanto": "hawqkit.targets.quanto",
    "exllamav3": "hawqkit.targets.exllamav3",
}

__all__ = ["TARGETS", "Target", "find_target", "ignored_plugins", "target_names"]


def find_target(name: str) -> Target:
    """Return the module of a target, built in or of another package.

    Raises:
        InputError: there is none of that name, or the package that announces it is broken.

    >>> find_target("bits").SIZED
    False
    """
    if name in TARGETS:
        return cast(Target, importlib.import_module(TARGETS[name]))
    from hawqkit.targets.plugins import find_plugins, load_plugin

    plugins = find_plugins(TARGETS)
    if name in plugins.targets:
        return load_plugin(plugins.targets[name])
    if name in plugins.clashes:
        raise InputError(plugins.clashes[name])
    known = sorted((*TARGETS, *plugins.targets))
    raise InputError(
        f"unknown target {name!r}: known are {', '.join(known)}." + did_you_mean(name, known)
    )


def target_names() -> tuple[str, ...]:
    """Return the names of all targets: the built-in ones, then those of other packages."""
    from hawqkit.targets.plugins import find_plugins

    return (*TARGETS, *find_plugins(TARGETS).targets)


def ignored_plugins() -> Sequence[str]:
    """Return a sentence about each target of another package that cannot be used by its name."""
    from hawqkit.targets.plugins import find_plugins

    return find_plugins(TARGETS).ignored
