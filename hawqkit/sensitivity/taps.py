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
from hawqkit.models.orientation import CONVOLUTIONS, TRANSPOSED
from hawqkit.records import Layer
from hawqkit.sensitivity.convolution_uses import convolution_use
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
        self._in_forward, self._awake, self._size = False, True, 0
        # The graph starts at the first layer, whose output needs no gradient otherwise.
        self._anchor = torch.zeros((), requires_grad=True)
        self._handles: list[RemovableHandle] = []
        for state in self._states:
            for name in (state.layer.name, *state.layer.tied):
                child = module.get_submodule(name)
                self._handles.append(child.register_forward_hook(self._hook(state, name, child)))

    @contextmanager
    def forward_pass(self, size: int) -> Iterator[None]:
        """Count uses inside; hooks that a checkpoint's recomputation runs later do not count.

        Args:
            size: examples of the batch, the first dimension of every layer's output.
        """
        for state in self._states:
            state.expected = 0
            state.uses.clear()
        self._size = size
        self._in_forward = True
        try:
            yield
        finally:
            self._in_forward = False

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Let the model run inside as if no tap were there."""
        self._awake = False
        try:
            yield
        finally:
            self._awake = True

    def unused(self) -> list[str]:
        """Return layers that the forward pass did not use; ask between forward and backward."""
        return [s.layer.name for s in self._states if s.expected == 0]

    def remove(self) -> None:
        """Take every hook out again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, state: _State, name: str, child: nn.Module) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if not (torch.is_grad_enabled() and self._awake):
                return output
            self._refuse_shape(name, child, output)
            if self._in_forward:
                state.expected += 1

            def take(saved: Tensor, gradient: Tensor) -> None:
                state.uses.append(_use(child, saved, gradient))
                if len(state.uses) == state.expected:
                    uses, state.uses, state.expected = state.uses, [], 0
                    self._receive(state.layer, uses)

            return _Tap.apply(output, self._anchor, inputs[0], take)  # type: ignore[no-any-return, no-untyped-call]

        return hook

    def _refuse_shape(self, name: str, child: nn.Module, output: Tensor) -> None:
        """Refuse an output whose first dimension is not the examples of the batch."""
        spatial = len(child.kernel_size) if isinstance(child, (*CONVOLUTIONS, *TRANSPOSED)) else 0
        if (
            output.shape[0] != self._size
            or output.ndim < 2
            or (spatial and output.ndim < 2 + spatial)
        ):
            raise Unsupported(
                f"layer {name}: its output has shape {tuple(output.shape)} in a batch of "
                f"{self._size}; only layers whose first dimension is the examples can be measured "
                "example by example. Exclude this layer."
            )


def _use(child: nn.Module, source: Tensor, gradient: Tensor) -> Use:
    """Return one call of a layer; what is not (examples, positions, features) is brought there."""
    if isinstance(child, (*CONVOLUTIONS, *TRANSPOSED)):
        return convolution_use(child, source, gradient)
    if gradient.ndim == 2:  # a layer that sees each example once
        source, gradient = source[:, None], gradient[:, None]
    gradient = gradient.flatten(1, -2)  # (B, T, features)
    if isinstance(child, nn.Embedding):
        return EmbeddingUse(source.flatten(1), gradient)
    return LinearUse(source.flatten(1, -2), gradient)


class _Tap(torch.autograd.Function):
    """Identity in place; its backward hands (saved input, output gradient) to `take`.

    In place, since a custom function's view may not be changed in place afterwards, which is what
    `ReLU(inplace=True)` does to a layer's output. The anchor requires a gradient and gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, source: Tensor, take: Callable[..., None]
    ) -> Tensor:
        ctx.save_for_backward(source)
        ctx.take = take
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (source,) = ctx.saved_tensors
        ctx.take(source, gradients[0])
        return gradients[0], None, None, None
