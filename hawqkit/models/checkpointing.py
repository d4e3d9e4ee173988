"""Activation checkpointing for a model in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hawqkit.errors import Unsupported


@contextmanager
def checkpointed(module: nn.Module) -> Iterator[None]:
    """Recompute each transformer block in the backward pass, inside the `with` block.

    transformers checkpoints only in training mode. Here `training` is set on the blocks themselves,
    not on what is in them, so dropout stays off and the numbers stay the same. Restored afterwards.

    Raises:
        Unsupported: the model has no block that transformers can checkpoint.
    """
    blocks = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise Unsupported(
            f"{type(module).__name__} has no blocks that can be checkpointed; "
            "set sensitivity.checkpointing to false and use a smaller batch."
        )
    names = ("gradient_checkpointing", "training", "_gradient_checkpointing_func")
    before = [{n: vars(b)[n] for n in names if n in vars(b)} for b in blocks]
    try:
        for block in blocks:
            block.gradient_checkpointing = True
            block.training = True
            vars(block)["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
        yield
    finally:
        for block, state in zip(blocks, before, strict=True):
            for name in names:
                vars(block).pop(name, None)
            vars(block).update(state)
