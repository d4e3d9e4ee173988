"""What a model is given, as facts: enough to run it again, or to trace it, without any data."""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import Tensor, nn

from hawqkit.errors import Unsupported
from hawqkit.models.batch import FIRST, Data
from hawqkit.models.layers import dtype_name
from hawqkit.models.model import LoadedModel
from hawqkit.records import ModelFacts
from hawqkit.records import Tensor as TensorFacts


def with_inputs(model: LoadedModel, data: Data) -> LoadedModel:
    """Return the model with the arguments of its forward in its facts, as one example gives them.

    Args:
        model: loaded or wrapped; its weights and layers stay the same objects.
        data: what it will be run on; the first example is looked at.

    Raises:
        Unsupported: an argument is no tensor, or its first dimension is not the examples.
    """
    given = data.micro_batch([0]).inputs(torch.device("cpu"))
    facts = []
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (1,):
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise Unsupported(
                f"argument {name!r} of the model is {came} for one example; arguments must be "
                "tensors whose first dimension is the examples."
            )
        shown = first_argument(model.module) if name == FIRST else name
        facts.append(TensorFacts(shown, dtype_name(value.dtype), tuple(value.shape[1:])))
    return replace(model, facts=replace(model.facts, inputs=tuple(facts)))


def stand_ins(facts: ModelFacts, examples: int) -> dict[str, Tensor]:
    """Return arguments of the right shapes by name: ones for masks, zeros for all others.

    Args:
        facts: of a model that has met data, see `with_inputs`.
        examples: length of the first dimension.

    Raises:
        Unsupported: the arguments are not known.

    >>> inputs = (TensorFacts("x", "float32", (3,)),)
    >>> facts = ModelFacts("net", "", "Net", 0, "float32", inputs=inputs)
    >>> stand_ins(facts, 2)["x"].shape
    torch.Size([2, 3])
    """
    if not facts.inputs:
        raise Unsupported(
            f"model {facts.source!r}: the shapes of its inputs are not known, so it cannot be "
            "traced; give examples=, as `make_examples` or `load_examples` return them."
        )
    return {
        x.name: torch.full(
            (examples, *x.shape), int(x.name.endswith("mask")), dtype=getattr(torch, x.dtype)
        )
        for x in facts.inputs
    }


def first_argument(module: nn.Module) -> str:
    """Return the name of the first argument of a network's forward.

    >>> first_argument(nn.Linear(2, 2))
    'input'
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind in kinds:
            return name
    raise Unsupported(
        f"forward of {type(module).__name__} takes no positional argument; name the argument, as "
        "in make_examples({'pixel_values': images}, labels)."
    )
