"""Find out what a path holds, and read the mix of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hawqkit.errors import InputError, Unsupported
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.contract import capped
from hawqkit.targets.foreign import configurations as known
from hawqkit.targets.foreign.contract import ForeignMix
from hawqkit.targets.foreign.gguf_files import read_gguf

Reader = Callable[[Mapping[str, Any], Sequence[Layer]], ForeignMix]

# `quant_method` of a configuration -> who reads it.
READERS: dict[str, Reader] = {
    "compressed-tensors": known.read_compressed_tensors,
    "gptq": known.read_gptq,
    "auto-round": known.read_auto_round,
    "intel/auto-round": known.read_auto_round,
    "awq": known.read_awq,
    "bitsandbytes": known.read_bitsandbytes,
}
CONFIGS = ("config.json", "quantize_config.json", "quantization_config.json")


def read_foreign(path: Path, layers: Sequence[Layer], facts: ModelFacts) -> ForeignMix:
    """Return the format that a checkpoint gives each layer.

    Args:
        path: a GGUF file; a `config.json`; or the folder that holds one.
        layers: of the model that the mix is for.
        facts: of that model.

    Raises:
        InputError: the path holds no quantized model, or one whose layers are not there.
        Unsupported: a layer is stored in a way that hawqkit has no format for; lists them.
    """
    found = _read(path, layers, facts)
    if found.unnamed:
        lines = [f"layer {name!r} is stored as {what}" for name, what in found.unnamed.items()]
        head = f"{path}: {len(lines)} of {len(layers)} layers are in none of `hawqkit formats`:"
        raise Unsupported("\n".join([head, *capped(lines)]))
    if all(name == "none" for name in found.layers.values()):
        raise InputError(
            f"{path}: a {found.kind} configuration that quantizes none of the {len(layers)} layers "
            "of this run; it is of another model, or its names differ."
        )
    return found


def _read(path: Path, layers: Sequence[Layer], facts: ModelFacts) -> ForeignMix:
    if path.suffix.lower() == ".gguf":
        return read_gguf(path, layers, facts)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        present = [path / name for name in CONFIGS if (path / name).is_file()]
        if not present and len(files) == 1:
            return read_gguf(files[0], layers, facts)
        if not present:
            raise InputError(f"{path} holds neither a config.json nor one GGUF file.")
        return _from_configs(present, layers)
    return _from_configs([path], layers)


def _from_configs(paths: Sequence[Path], layers: Sequence[Layer]) -> ForeignMix:
    seen = []
    for path in paths:
        config = _json(path)
        part = config.get("quantization_config") or config.get("quantization") or config
        method = str(part.get("quant_method", "")) if isinstance(part, Mapping) else ""
        if method in READERS:
            return READERS[method](part, layers)
        if isinstance(part, Mapping) and not method and {"bits", "group_size"} <= set(part):
            if "quantization" in config or "mode" in part:
                return known.read_mlx(part, layers, _tensor_names(path.parent))
            return known.read_gptq(part, layers)
        seen.append(
            f"{path} has quant_method {method!r}" if method else f"{path} quantizes nothing"
        )
    raise InputError(f"{'; '.join(seen)}: known are {', '.join(READERS)}, mlx and GGUF files.")


def _tensor_names(folder: Path) -> frozenset[str]:
    """Return the names of all tensors in a folder's safetensors files."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            names.update(file.keys())
    return frozenset(names)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path}: a JSON object was expected, and a {type(content).__name__} came."
        )
    return content
