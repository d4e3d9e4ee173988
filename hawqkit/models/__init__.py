"""Models and text: the only room that knows transformers. Names resolve on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hawqkit.models.batch import Batch, Data
    from hawqkit.models.batches import Sequences, load_batches
    from hawqkit.models.examples import Examples, make_examples
    from hawqkit.models.labelled import load_examples
    from hawqkit.models.layers import find_layers
    from hawqkit.models.loading import load_model
    from hawqkit.models.model import LoadedModel, wrap_model

_HOMES = {
    "Batch": "batch",
    "Data": "batch",
    "Examples": "examples",
    "LoadedModel": "model",
    "Sequences": "batches",
    "find_layers": "layers",
    "load_batches": "batches",
    "load_examples": "labelled",
    "load_model": "loading",
    "make_examples": "examples",
    "wrap_model": "model",
}

__all__ = [
    "Batch",
    "Data",
    "Examples",
    "LoadedModel",
    "Sequences",
    "find_layers",
    "load_batches",
    "load_examples",
    "load_model",
    "make_examples",
    "wrap_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
