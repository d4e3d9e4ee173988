"""Small classifiers and what runs their ONNX graphs, for the tests of the target and of latency."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pico
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hawqkit.models.examples import Examples, make_examples
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.records import Allocation, Certificate, Totals

CLASSES = 3


class Residual(nn.Module):
    """A small CNN: strides, groups, a depthwise layer, a shortcut, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.grouped = nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(64)
        self.shortcut = nn.Conv2d(32, 64, 1, stride=2)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        y = torch.relu(self.depthwise(x))
        y = self.norm(self.grouped(y)) + self.shortcut(x)
        return self.head(torch.relu(y).mean((2, 3)))


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill parameters from a generator, and statistics of batch norms with plain numbers."""
    pico.fill(module, seed, whole_kernels=True)
    generator = torch.Generator().manual_seed(seed + 1)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.weight.data.uniform_(0.5, 1.5, generator=generator)
            assert child.running_mean is not None
            assert child.running_var is not None
            child.running_mean.normal_(0.0, 0.1, generator=generator)
            child.running_var.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def cnn() -> tuple[nn.Module, dict[str, Tensor]]:
    return filled(Residual()), {"image": images(4, 2, 8, 8)}


@cache
def sequence_net() -> tuple[nn.Module, dict[str, Tensor]]:
    net = nn.Sequential(
        nn.Conv1d(4, 16, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose1d(16, 32, 3, groups=4),
        nn.ReLU(),
        nn.ConvTranspose1d(32, 8, 2, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(160, CLASSES),
    )
    return filled(net), {"input": images(4, 4, 10)}


@cache
def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return filled(ResNetForImageClassification(config)), {"pixel_values": images(4, 3, 32, 32)}


@cache
def mobilenet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=CLASSES)
    model = filled(MobileNetV2ForImageClassification(config))
    return model, {"pixel_values": images(2, 3, 32, 32)}


@cache
def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_labels=CLASSES,
    )
    return filled(ViTForImageClassification(config)), {"pixel_values": images(4, 3, 16, 16)}


@cache
def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=CLASSES,
    )
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    tokens = torch.randint(1, 64, (4, 9), generator=generator)
    model = filled(BertForSequenceClassification(config))
    return model, {"input_ids": tokens, "attention_mask": mask}


def tiny(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    return filled(nn.Sequential(nn.Linear(32, CLASSES)), seed), {"input": images(2, 32)}


def loaded(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[LoadedModel, Examples]:
    count = len(next(iter(inputs.values())))
    examples = make_examples(inputs, torch.arange(count) % CLASSES, classes=CLASSES)
    return wrap_model(module, name="net"), examples


def allocation(mix: Mapping[str, str], **facts: Any) -> Allocation:
    return Allocation(
        layers=dict(mix),
        budgets={},
        totals=Totals(4.0, 4.25),
        runtime="transformers",
        score="trace",
        risk=0.0,
        objective=0.0,
        certificate=Certificate("test", "optimal", 0.0, 0.0, 0.0, len(mix), len(mix)),
        **facts,
    )


def run_graph(
    path: Path | bytes, feed: Mapping[str, Tensor], *, optimize: bool = True, accuracy: str = "1"
) -> np.ndarray[Any, Any]:
    """Run a graph as the README of an export says, and return its logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy)
    if not optimize:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    source = path if isinstance(path, bytes) else str(path)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(
        ["logits"], {name: value.numpy() for name, value in feed.items()}
    )[0]
    return found
