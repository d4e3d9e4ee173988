"""A consumer in its own environment: a mix is exported, applied, loaded there and reported back."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from configuration_cases import allocation
from consumer_matrix import checked
from safetensors.torch import load_file
from torch import Tensor, nn

from hawqkit.models.loading import load_model
from hawqkit.models.model import LoadedModel
from hawqkit.targets import find_target

ROOT = Path(__file__).parent.parent
TOKENS = torch.arange(8, 72)[None] % 96  # (1, 64), as in tests/consumers/probing.py
EIGHT = "int8-channel"


@dataclass(frozen=True)
class Outcome:
    """What a consumer made of a mix.

    Attributes:
        model: the model before it.
        layers: name -> bits and group_size of every layer that is quantized there.
        weights: name -> the weight (rows, columns) that it multiplies with.
        logits: (64, V) of `TOKENS`.
    """

    model: LoadedModel
    layers: dict[str, dict[str, Any]]
    weights: dict[str, Tensor]
    logits: Tensor


def consumer(name: str) -> Path:
    """Return the Python of a consumer; skips the test where its environment was not made."""
    checked(name)
    folder = ROOT / ".targets" / name
    python = folder / "bin" / "python"
    if not python.exists() or not list(folder.glob(".made-*")):  # the second: pip was interrupted
        pytest.skip(f"the environment of {name} is not there: make it with `.ci/consumer {name}`")
    return python


def cycled(model: LoadedModel, formats: tuple[str, ...]) -> dict[str, str]:
    """Return a mix in which the linear layers take formats in turn, and the head is kept.

    Layers that a runtime fuses get one format, and the two blocks begin at different formats.
    """
    mix = {}
    steps: dict[str, int] = {}
    for layer in model.layers:
        if layer.kind != "linear" or layer.name == "lm_head":
            mix[layer.name] = "none"
            continue
        parent, _, leaf = layer.name.rpartition(".")
        fused = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        key = f"{parent}.{fused.get(leaf, leaf)}"
        mix[layer.name] = formats[steps.setdefault(key, len(steps)) % len(formats)]
    return mix


def run_consumer(
    name: str, formats: tuple[str, ...], folder: Path, *options: str, runtime: str = "transformers",
    more: Mapping[str, str] | None = None, tied: bool = False,
) -> tuple[dict[str, str], Outcome]:  # fmt: skip
    """Export a mix of a two-layer Llama, apply it by the script, load it in the consumer.

    `more` overrules the mix; `tied` is of the model's head.
    """
    python = consumer(name)
    source = pico.save(
        folder / "model", pico.llama(hidden=128, intermediate=256, seed=1, tied=tied)
    )
    model = load_model(source)
    mix = {**cycled(model, formats), **(more or {})}
    find_target(name).write(allocation(mix, runtime), folder / "export", model)
    checked(name, "written")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    script = ROOT / "tests" / "consumers" / f"{name.replace('-', '_')}.py"
    for command in (
        [folder / "export" / "apply.py", source, folder / "output", *options],
        [script, source, folder / "output", folder / "result"],
    ):
        done = subprocess.run(
            [str(python), *map(str, command)],
            env=environment, cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    layers = json.loads((folder / "result" / "layers.json").read_text())
    tensors = load_file(folder / "result" / "tensors.safetensors")
    logits = tensors.pop("logits")
    weights = {key.removeprefix("weight."): value for key, value in tensors.items()}
    checked(name, "loaded")
    return mix, Outcome(model, layers, weights, logits)


@torch.no_grad()
def logits_with(model: LoadedModel, weights: dict[str, Tensor]) -> Tensor:
    """Return the logits (64, V) of our own model with other weights in its layers."""
    for name, weight in weights.items():
        module = model.module.get_submodule(name)
        assert isinstance(module, nn.Linear | nn.Embedding)
        module.weight.copy_(weight)
    logits: Tensor = model.module(TOKENS).logits[0].float()
    return logits


def texts(folder: Path, count: int = 32) -> Path:
    """Write calibration texts of characters that the tokenizer of pico models knows."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": "".join(chr(97 + (i * j + j // 3) % 26) for j in range(96))})
        for i in range(1, count + 1)
    ]
    path = folder / "texts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
