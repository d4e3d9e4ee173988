"""A small convolutional classifier with labelled images, and a run of everything on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from pico import fill
from torch import Tensor, nn

import hawqkit as hk
from hawqkit.models.batch import predictions
from hawqkit.records import Allocation, Sensitivities, Validation

CLASSES = 5
NAMES = ("cat", "dog", "horse", "ship", "truck")
FORMATS = ("int2-channel", "int3-channel", "int8-channel")


@dataclass(frozen=True)
class Case:
    """A model, its data, and the records of a run."""

    model: Any
    calibration: Any
    held_out: Any
    sensitivities: Sensitivities
    allocation: Allocation
    validation: Validation


@lru_cache
def network(seed: int = 0) -> nn.Module:
    """Return a net of two convolutions and a head, whose predictions differ between inputs."""
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 9, CLASSES),
    )  # fmt: skip
    fill(module, seed, scale=2.0, whole_kernels=True)
    return module.eval()


def images(count: int, seed: int) -> Tensor:
    """Return normalized images (S, 3, 8, 8)."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def labelled(x: Tensor, right: float = 0.8, seed: int = 0) -> Tensor:
    """Return labels of which about a share is what the network says, and the rest at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        said = network()(x).argmax(-1)
    wild = torch.randint(0, CLASSES, (len(x),), generator=generator)
    return torch.where(torch.rand(len(x), generator=generator) < right, said, wild)


def examples(count: int, seed: int, **facts: Any) -> Any:
    """Return labelled images."""
    x = images(count, seed)
    given = {"classes": CLASSES, "names": NAMES, "kind": "images", "source": f"photos {seed}"}
    return hk.make_examples(x, labelled(x, seed=seed), **(given | facts))


@lru_cache
def case() -> Case:
    """Return a run with 2.5 average bits, where many predictions flip."""
    model = hk.wrap_model(network(), name="net")
    calibration, held_out = examples(48, 1, withheld=16), examples(150, 2)
    sensitivities = hk.probe(model, calibration, FORMATS)
    allocation = hk.allocate(sensitivities, average_bits=2.5, draws=4)
    dark = examples(60, 3, source="dark photos")
    validation = hk.validate(model, allocation, held_out, calibration=calibration, dark=dark)
    return Case(model, calibration, held_out, sensitivities, allocation, validation)


@torch.no_grad()
def logits_of(model: Any, data: Any) -> Tensor:
    """Return the logits (S, C) in float64, from one batch of all examples."""
    batch = data.micro_batch(range(len(data)))
    return predictions(model.module, batch, model.device)[:, 0].double()
