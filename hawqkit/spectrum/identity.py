"""What a measurement was made of, as hashes: parameters and batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel


def model_identity(model: nn.Module | LoadedModel) -> tuple[str, str]:
    """Return name and hash of a model; of a plain network, the hash of its parameters' values."""
    if isinstance(model, LoadedModel):
        return model.facts.source, model.facts.hash
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}\n".encode())
        _add(digest, tensor)
    return type(model).__name__, digest.hexdigest()


def batches_identity(batches: Iterable[Any] | Data) -> str:
    """Return a hash of batches: every tensor and number in them, in order."""
    if isinstance(batches, Data):
        return batches.facts.hash
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(b"batch\n")
        _add(digest, batch)
    return digest.hexdigest()


def _add(digest: Any, item: Any) -> None:
    if isinstance(item, Tensor):
        tensor = item.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    elif isinstance(item, Mapping):
        for key in item:
            digest.update(f"{key}\n".encode())
            _add(digest, item[key])
    elif isinstance(item, list | tuple):
        for value in item:
            _add(digest, value)
    elif is_dataclass(item) and not isinstance(item, type):
        for field in fields(item):
            _add(digest, getattr(item, field.name))
    else:
        digest.update(f"{item!r}\n".encode())
