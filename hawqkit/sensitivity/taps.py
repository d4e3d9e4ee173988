"""Taps on layers: hand out every use of a weight - its inputs and its output gradients.

A tap is an identity in the graph that saves the layer's input as autograd itself would for a weight
gradient. So activation checkpointing drops and recomputes it like any other saved tensor, and no
weight has to require a gradient. Where inputs are to be rounded, a second tap before the layer
hands out the gradient at its input through this layer alone, whoever else reads the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hawqkit.errors import Unsupported
from hawqkit.models.orientation import CONVOLUTIONS, TRANSPOSED
from hawqkit.quantize.input_rounding import InputQuantizer, first_input
from hawqkit.records import Layer
from hawqkit.sensitivity.convolution_uses import convolution_use
from hawqkit.sensitivity.input_terms import Call, sum_inputs
from hawqkit.sensitivity.uses import EmbeddingUse, LinearUse, Use

Receive = Callable[[Layer, list[Call]], None]
# Layer -> module that holds its weight -> what rounds the inputs, one for each width.
Quantizers = Mapping[str, Mapping[str, Sequence[InputQuantizer]]]


@dataclass
class _State:
    """Calls of one layer within one forward and backward pass."""

    layer: Layer
    expected: int = 0
    calls: list[Call] = field(default_factory=list)


@dataclass
class _Open:
    """A call between its two taps: first its output gradient is known, then that at its input."""

    source: Tensor | None = None
    gradient: Tensor | None = None


class Taps:
    """Taps on the modules of `layers`; `receive(layer, calls)` is called once a layer and pass.

    A tied weight's uses arrive together, after the last of them.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: tuple[Layer, ...],
        receive: Receive,
        quantizers: Quantizers | None = None,
    ) -> None:
        self._receive = receive
        self._attention: Tensor | None = None
        self._states = [_State(layer) for layer in layers]
        self._in_forward, self._awake, self._size = False, True, 0
        # The graph starts at the first layer, whose output needs no gradient otherwise.
        self._anchor = torch.zeros((), requires_grad=True)
        self._handles: list[RemovableHandle] = []
        for state in self._states:
            for name in (state.layer.name, *state.layer.tied):
                child = module.get_submodule(name)
                rounding = (quantizers or {}).get(state.layer.name, {}).get(name, ())
                self._handles += self._tap(state, name, child, rounding)

    @contextmanager
    def forward_pass(self, size: int, attention: Tensor | None = None) -> Iterator[None]:
        """Count uses inside; hooks that a checkpoint's recomputation runs later do not count.

        Args:
            size: examples of the batch, the first dimension of every layer's output.
            attention: (B, T) real positions, for errors of rounded inputs.
        """
        for state in self._states:
            state.expected = 0
            state.calls.clear()
        self._size, self._attention = size, attention
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

    def _tap(
        self, state: _State, name: str, child: nn.Module, rounding: Sequence[InputQuantizer]
    ) -> list[RemovableHandle]:
        """Put hooks on one module; the one before it only where inputs are rounded."""
        calls: list[_Open] = []  # entered and not yet left: none, or one

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not (torch.is_grad_enabled() and self._awake):
                return None
            call = _Open()
            calls.append(call)

            def finish(gradient: Tensor) -> None:
                self._finish(state, child, call, gradient, rounding)

            given = first_input(name, inputs)
            return _InputTap.apply(given, self._anchor, finish), *inputs[1:]  # type: ignore[no-untyped-call]

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if not (torch.is_grad_enabled() and self._awake):
                return output
            self._refuse_shape(name, child, output)
            if _computes_otherwise(child, inputs[0], output):
                raise Unsupported(
                    f"layer {name} is a {type(child).__name__} whose forward is its own and does "
                    f"something else than {_plain_class(child).__name__} does with this weight "
                    "(it scales, pads or normalizes), so its gradient is not known. Exclude it."
                )
            if self._in_forward:
                state.expected += 1
            call = calls.pop() if rounding else None

            def take(saved: Tensor, gradient: Tensor) -> None:
                if call is None:
                    self._add(state, Call(_use(child, saved, gradient)))
                else:
                    call.source, call.gradient = saved, gradient

            return _Tap.apply(output, self._anchor, inputs[0], take)  # type: ignore[no-any-return, no-untyped-call]

        handles = [child.register_forward_hook(after)]
        return [child.register_forward_pre_hook(before), *handles] if rounding else handles

    def _finish(
        self,
        state: _State,
        child: nn.Module,
        call: _Open,
        gradient: Tensor,
        rounding: Sequence[InputQuantizer],
    ) -> None:
        """Round the inputs of a call, now that the gradients on both of its sides are known."""
        assert call.source is not None
        assert call.gradient is not None
        given, sums = sum_inputs(call.source, gradient, rounding, self._attention)
        rounded = tuple(_use(child, source, call.gradient) for source in given)
        self._add(state, Call(_use(child, call.source, call.gradient), rounded, sums))

    def _add(self, state: _State, call: Call) -> None:
        state.calls.append(call)
        if len(state.calls) == state.expected:
            calls, state.calls, state.expected = state.calls, [], 0
            self._receive(state.layer, calls)

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


def _plain_class(child: nn.Module) -> type[nn.Module]:
    """Return the class of torch (or transformers' Conv1D) whose forward the uses assume."""
    known = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED)
    return next((k for k in type(child).__mro__ if k in known), type(child))


@torch.no_grad()
def _computes_otherwise(child: nn.Module, source: Tensor, output: Tensor) -> bool:
    """Whether a module with a forward of its own returns something else than its class would.

    Such are embeddings that scale what they look up, and convolutions that pad or normalize inside.
    """
    plain = _plain_class(child)
    if type(child).forward is plain.forward:
        return False
    try:
        expected = plain.forward(child, source)
    except RuntimeError:  # sizes that only the module's own forward makes fit
        return True
    if expected.shape != output.shape:
        return True
    tolerance = max(1e-3, 4 * torch.finfo(output.dtype).eps)
    away = torch.linalg.vector_norm((expected - output).double())
    return bool(away > tolerance * torch.linalg.vector_norm(expected.double()))


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


class _InputTap(torch.autograd.Function):
    """Identity before a layer; its backward hands the gradient at the input to `finish`."""

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, anchor: Tensor, finish: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.finish = finish
        return source.view_as(source)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.finish(gradients[0])
        return gradients[0], None, None
