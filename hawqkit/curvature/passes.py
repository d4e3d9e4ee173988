"""The state in which a model is differentiated twice, and its restoration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hawqkit.curvature.parameters import Parameters
from hawqkit.errors import Unsupported

# Implementations of attention that keep no second derivative whatever torch's kernels do.
_FUSED = ("flash_attention", "flex_attention", "paged", "kernels-community")


@contextmanager
def differentiable(
    module: nn.Module, parameters: Parameters, *, twice: bool = True
) -> Iterator[None]:
    """Let exactly the chosen parameters want gradients, and attention have second derivatives.

    Inside, gradients are enabled, `scaled_dot_product_attention` runs as plain matrix products, and
    a transformers model with another fused attention is switched to `eager`. All is restored.

    Args:
        module: the model.
        parameters: what gradients are asked for.
        twice: False leaves attention as it is, for first derivatives alone.
    """
    before = [(p, p.requires_grad) for p in module.parameters()]
    chosen = {id(p) for p in parameters.tensors}
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        if twice:
            stack.enter_context(_eager_attention(module))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.enable_grad())
        try:
            # Its fused encoder layer has no derivatives, and is chosen where no weight wants one.
            torch.backends.mha.set_fastpath_enabled(False)
            for parameter, _ in before:
                if parameter.is_floating_point():
                    parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for parameter, wanted in before:
                if parameter.requires_grad is not wanted:
                    parameter.requires_grad_(wanted)


def refuse_training_mode(module: nn.Module) -> None:
    """Refuse a model whose loss changes from pass to pass.

    Raises:
        Unsupported: the model or a module in it is in training mode.
    """
    training = [name for name, child in module.named_modules() if child.training]
    if training:
        place = "the model is" if training[0] == "" else f"{training[0]!r} is"
        raise Unsupported(
            f"{place} in training mode, where dropout makes the loss another function in every "
            "pass and batch norm ties the examples of a batch to each other, so the matrix is not "
            "defined; call model.eval() first."
        )


def attention_note(module: nn.Module) -> str | None:
    """Return what a record should say about the model's attention, None if there is nothing."""
    found = sorted({i for i in map(_implementation, _configs(module)) if i})
    fused = [i for i in found if i == "sdpa" or i.startswith(_FUSED)]
    if any(isinstance(child, nn.MultiheadAttention) for child in module.modules()):
        fused.append("nn.MultiheadAttention")
    if not fused:
        return None
    return (
        f"attention ({', '.join(fused)}) ran as plain matrix products, since fused kernels have no "
        "second derivatives."
    )


@contextmanager
def _eager_attention(module: nn.Module) -> Iterator[None]:
    switched = [c for c in _configs(module) if str(_implementation(c)).startswith(_FUSED)]
    before = [c._attn_implementation for c in switched]
    try:
        for config in switched:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(switched, before, strict=True):
            config._attn_implementation = implementation


def _implementation(config: Any) -> str | None:
    found = getattr(config, "_attn_implementation", None)
    return found if isinstance(found, str) else None


def _configs(module: nn.Module) -> list[Any]:
    """Return the configurations of a transformers model and its parts, each once."""
    found = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    return list(found.values())
