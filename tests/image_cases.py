"""Image classifiers, and images that say their class, for the tests of image data."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pico
import torch
from PIL import Image

from hawqkit.models.examples import Examples
from hawqkit.models.model import LoadedModel, wrap_model

NAMES = ("bird", "cat", "dog")


def classifier(
    kind: str = "resnet",
    *,
    names: tuple[str, ...] = NAMES,
    channels: int = 3,
    size: int = 32,
    read: int | None = None,
) -> LoadedModel:
    """Return a model whose processor resizes to `read`."""
    module = pico.image_classifier(kind, names=names, channels=channels, size=size)
    return wrap_model(module, name=kind, processor=pico.image_processor(read or size, channels))


def pixels(label: int, number: int, channels: int = 3) -> np.ndarray:
    """Return an image that says its class in its first pixel, and is unlike all others."""
    generator = np.random.default_rng(1000 * label + number)
    image = generator.integers(0, 256, (32, 32, channels), dtype=np.uint8)
    image[0, 0] = 80 * label
    return image if channels > 1 else image[..., 0]


def write(path: Path, image: np.ndarray, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).convert(mode).save(path)


def folder(path: Path, count: int = 8, names: tuple[str, ...] = NAMES) -> Path:
    for label, name in enumerate(names):
        for number in range(count):
            write(path / name / f"{number}.png", pixels(label, number))
    return path


def classes_seen(examples: Examples) -> list[int]:
    """Return the class that each image itself says."""
    value = examples.inputs["pixel_values"][:, 0, 0, 0]
    return torch.round((value + 1) / 2 * 255 / 80).long().tolist()


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
