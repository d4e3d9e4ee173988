"""Taps on layers: hand out every use of a weight - its inputs and its output gradients.

A tap is an identity in the graph that saves the layer's input as autograd itself would for a weight
gradient. So activation checkpointing drops and recomputes it like any other saved tensor, and no
weight has to require a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hawqkit.errors import Unsupported
from hawqkit.records import Layer
from hawqkit.sensitivity.uses import EmbeddingUse, LinearUse, Use

Receive = Callable[[Layer, list[Use]], None]


@dataclass
class _State:
    """Uses of one layer within one forward and backward pass."""

    layer: Layer
    expected: int = 0
    uses: list[Use] = field(default_factory=list)


class Taps:
    """Taps on the modules of `layers`; `receive(layer, uses)` is called once a layer and pass.

    A tied weight's uses arrive together, after the last of them.
    """

    def __init__(self, module: nn.Module, layers: tuple[Layer, ...], receive: Receive) -> None:
        self._receive = receive
        self._states = [_State(layer) for layer in layers]
        self._in_forward = False
        self._handles: list[RemovableHandle] = []
        for state in self._states:
            for name in (state.layer.name, *state.layer.tied):
                child = module.get_submodule(name)
                self._handles.append(child.register_forward_hook(self._hook(state, name, child)))

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Count uses inside; hooks that a checkpoint's recomputation runs later do not count."""
        for state in self._states:
            state.expected = 0
            state.uses.clear()
        self._in_forward = True
        try:
            yield
        finally:
            self._in_forward = False

    def unused(self) -> list[str]:
        """Return layers that the forward pass did not use; ask between forward and backward."""
        return [s.layer.name for s in self._states if s.expected == 0]

    def remove(self) -> None:
        """Take every hook out again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, state: _State, name: str, child: nn.Module) -> Callable[..., Tensor]:
        embedding = isinstance(child, nn.Embedding)

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            source = inputs[0]
            if output.ndim != 3:
                raise Unsupported(
                    f"layer {name}: its output has shape {tuple(output.shape)}; only (sequences, "
                    "positions, features) can be measured by sequence. Exclude this layer."
                )
            if self._in_forward:
                state.expected += 1
            if (
                not output.requires_grad
            ):  # nothing before this layer is measured: the graph starts here
                output = output.detach().requires_grad_()

            def take(saved: Tensor, gradient: Tensor) -> None:
                use = EmbeddingUse(saved, gradient) if embedding else LinearUse(saved, gradient)
                state.uses.append(use)
                if len(state.uses) == state.expected:
                    uses, state.uses, state.expected = state.uses, [], 0
                    self._receive(state.layer, uses)

            return _Tap.apply(output, source, take)  # type: ignore[no-any-return, no-untyped-call]

        return hook


class _Tap(torch.autograd.Function):
    """Identity; its backward hands (saved input, output gradient) to `take`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, source: Tensor, take: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(source)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (source,) = ctx.saved_tensors
        ctx.take(source, gradients[0])
        return gradients[0], None, None
