"""Readers of the data that `fetch` brings: Fashion-MNIST and labelled sentences."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

FASHION_CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images' pixels between 0 and 1
LONGEST = 64  # tokens of a sentence


@dataclass(frozen=True, slots=True)
class Arrays:
    """Labelled examples; S of them.

    Attributes:
        inputs: argument of the model's forward -> (S, ...); one without a name is called `x`.
        labels: (S,) int64.
    """

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)

    def take(self, index: Tensor | slice) -> Arrays:
        """Return some examples."""
        return Arrays({k: v[index] for k, v in self.inputs.items()}, self.labels[index])


def cache() -> Path:
    """Return the folder that `fetch` fills: HAWQKIT_BENCHMARK_CACHE, else .cache beside it."""
    return Path(os.environ.get("HAWQKIT_BENCHMARK_CACHE") or Path(__file__).parent / ".cache")


def fetched(name: str) -> Path:
    """Return a fetched file or folder.

    Raises:
        SystemExit: it is not there.
    """
    path = cache() / name
    if not path.exists():
        raise SystemExit(
            f"{name} is not in the cache {cache()}: run `bash benchmarks/classifiers/fetch` first "
            "(HAWQKIT_BENCHMARK_CACHE moves the cache)."
        )
    return path


def fashion(part: str) -> tuple[Tensor, Tensor]:
    """Return Fashion-MNIST's `train` (60,000) or `t10k` (10,000).

    Returns:
        Pixels (S, 28, 28) uint8 and labels (S,) int64.
    """
    images = read_idx(fetched(f"fashion-mnist/{part}-images-idx3-ubyte.gz"))
    labels = read_idx(fetched(f"fashion-mnist/{part}-labels-idx1-ubyte.gz"))
    return images, labels.long()


def read_idx(path: Path) -> Tensor:
    """Read a gzipped array of bytes: two zeros, 8 for bytes, the number of dimensions, these, data.

    Raises:
        SystemExit: the file is of another kind, or its length is not what its head says.
    """
    with gzip.open(path) as file:
        content = file.read()
    dimensions = content[3]
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], ">u4").astype(int).tolist()
    if content[:3] != b"\0\0\x08" or len(content) - start != np.prod(shape):
        raise SystemExit(f"{path} is no whole idx file of bytes; fetch it again.")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def small_images(pixels: Tensor) -> Tensor:
    """Return standardized images (S, 1, 28, 28) of pixels (S, 28, 28)."""
    return ((pixels.float() / 255 - MEAN) / STD)[:, None]


def large_images(pixels: Tensor, size: int = 96) -> Tensor:
    """Return images (S, 3, size, size) as EfficientNet-Lite takes them: (pixel - 127) / 128."""
    wide = interpolate(pixels.float()[:, None], (size, size), mode="bilinear", align_corners=False)
    return ((wide - 127) / 128).expand(-1, 3, -1, -1)


def sentences() -> tuple[list[str], Tensor]:
    """Return 3,000 sentences of reviews, shuffled, and whether each is kind (1) or not (0).

    They are the sentences of Kotzias et al. 2015 (amazon, imdb, yelp) as npm's `sentiment` ships
    them, a few of which have no class.
    """
    rows: list[dict[str, Any]] = []
    for name in ("amazon", "imdb", "yelp"):
        found = json.loads(fetched(f"sentences/{name}.json").read_text(encoding="utf-8"))
        rows += [row for row in found if row.get("class") in (0, 1)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [str(rows[i]["text"]).strip() for i in order]
    return texts, torch.tensor([int(rows[i]["class"]) for i in order])


def tokenized(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `token_type_ids`, each (S, longest)."""
    made = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
