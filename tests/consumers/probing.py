"""What every consumer's script does with the model that it loaded; needs torch and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

TOKENS = torch.arange(8, 72)[None] % 96  # (1, 64), the same in the tests


@torch.no_grad()
def report(model: nn.Module, settings: Mapping[str, Mapping[str, Any]], result: Path) -> None:
    """Write what a consumer made of a model into the folder `result`.

    `layers.json` holds the settings by name; `tensors.safetensors` the logits (64, V), and for each
    layer of the settings the weight (rows, columns) that it multiplies with: what a linear layer
    makes of the unit vectors.
    """
    modules = dict(model.named_modules())
    tensors = {"logits": model(TOKENS).logits[0].float().contiguous()}
    for name in settings:
        module = modules[name]
        dtype = next(
            (p.dtype for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()),
            torch.float32,
        )
        if "in_features" in dir(module):
            columns = int(module.in_features)  # type: ignore[arg-type]
        else:
            columns = int(module.infeatures)  # type: ignore[arg-type]
        rows = module(torch.eye(columns, dtype=dtype)[None])[0]  # (columns, rows)
        tensors[f"weight.{name}"] = rows.T.float().contiguous()
    result.mkdir(parents=True, exist_ok=True)
    save_file(tensors, result / "tensors.safetensors")
    (result / "layers.json").write_text(json.dumps(settings), encoding="utf-8")


def packed_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the settings of layers that hold `qweight`; -1 and the whole row are "channel"."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            columns = getattr(module, "in_features", None) or module.infeatures
            group = int(module.group_size)  # type: ignore[arg-type]
            found[name] = {
                "bits": int(module.bits),  # type: ignore[arg-type]
                "group_size": None if group in (-1, columns) else group,
            }
    return found
