"""Logits and their derivative along the errors of all layers at once, in one pass.

In forward mode the errors are the tangents of the weights, and what rounding changes a layer's
input by is added to the input's tangent. Where that cannot be, the outputs are differenced at two
distances.

Letters in shapes: b examples, t predictions of an example, n counted ones of a batch, V classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from hawqkit.curvature.parameters import norm
from hawqkit.errors import NumericalError
from hawqkit.models.batch import Batch, predictions
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.input_rounding import InputQuantizer, first_input

FORWARD, DIFFERENCE = "forward", "difference"

Rounding = tuple[str, nn.Module, InputQuantizer]  # layer, module, what rounds its input
Hook = Callable[[nn.Module, tuple[Any, ...]], Any]

# Steps of a difference, over cbrt(eps) |w| / |dW|, in the order in which they are tried.
SHARES = (1.0, 1 / 8, 1 / 64)
# Most that the differences at one step and at twice that step may differ, relatively. Truncation is
# of second order, so the nearer one has a third of what they differ by; of rounding it has at most
# nine tenths. The KL, of second order in the derivative, is then right to 2 % or better.
DISAGREEMENT = 0.01

# Share of the errors from which the parabola is extrapolated. Kinks of ReLU bend the logits of a
# mix, which is not seen from where none is crossed; rounding enters by eps / QUARTER^2.
QUARTER = 0.25
COARSEST = 1e-4  # eps of numbers that the parabola serves: float32 and float64


class _Predictions(nn.Module):
    """A model that is given a batch, for functional_call."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model = module
        self._device = device
        self.training = module.training

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits (b, t, V)."""
        return predictions(self.model, batch, self._device)


@dataclass(slots=True)
class Derivative:
    """Logits and their derivative along the errors, in one of two ways.

    Attributes:
        errors: parameter name -> dW.
        roundings: of inputs.
        how: `forward`; `difference` from the first batch on that forward mode did not serve.
        reason: why not.
    """

    model: LoadedModel
    errors: dict[str, Tensor]
    roundings: list[Rounding]
    how: str
    reason: str = ""
    _share: int = 0  # the step that served last
    _changes: dict[nn.Module, list[Tensor]] = field(default_factory=dict)

    def at(self, part: Batch) -> tuple[Tensor, Tensor]:
        """Return z and t of the counted predictions, (n, V) each.

        Raises:
            NumericalError: t is not finite, or depends on the step.
        """
        if self.how == FORWARD:
            try:
                z, t = self._forward(part)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # NotImplementedError is one
                self.reason = (str(error) or type(error).__name__).splitlines()[0][:160]
            else:
                if bool(torch.isfinite(t).all()):
                    return z, t
                self.reason = "the derivative in forward mode is not finite."
            self.how = DIFFERENCE
        return self._difference(part)

    def parabola(self, part: Batch, z: Tensor) -> Tensor | None:
        """Return s = [z(e) - z(-e)] / 2e + [z(e) + z(-e) - 2z] / 2e^2, (n, V), with e = 1/4.

        None where numbers are too coarse for it.

        Args:
            part: the batch that `at` was given last.
            z: that `at` returned.
        """
        if self._eps() > COARSEST or torch.finfo(z.dtype).eps > COARSEST:
            return None
        ahead, behind = self._sides(part, QUARTER)
        return (ahead - behind) / (2 * QUARTER) + (ahead + behind - 2 * z) / (2 * QUARTER**2)

    def _forward(self, part: Batch) -> tuple[Tensor, Tensor]:
        wrapped = _Predictions(self.model.module, self.model.device)
        mask = part.predicts.to(self.model.device)
        self._changes = {}
        with forward_ad.dual_level(), _hooked(self._rounds_tangent, self.roundings):
            duals = {
                f"model.{name}": _dual(_value(self.model.module, name), error)
                for name, error in self.errors.items()
            }
            found = torch.func.functional_call(wrapped, duals, (part,))
            z, t = _apart(found)
            t = torch.zeros_like(z) if t is None else t
        return z[mask], t[mask]

    def _rounds_tangent(self, layer: str, module: nn.Module, quantizer: InputQuantizer) -> Hook:
        noted = self._changes.setdefault(module, [])

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            value, tangent = _apart(first_input(layer, inputs))
            change = quantizer(value) - value
            noted.append(change)
            total = change if tangent is None else tangent + change
            return _dual(value, total), *inputs[1:]

        return hook

    def _difference(self, part: Batch) -> tuple[Tensor, Tensor]:
        """Return z, and t from the first step at which the differences at e and 2e agree."""
        module, device = self.model.module, self.model.device
        self._changes = {}
        with _hooked(self._notes_change, self.roundings):
            z = counted_logits(module, part, device)
        apart = float("nan")
        for tried in range(len(SHARES)):
            place = (self._share + tried) % len(SHARES)
            step = SHARES[place] * self._step()
            near, far = (self._quotient(part, times * step) for times in (1, 2))
            size = norm([near])
            apart = norm([near - far]) / size if size else norm([far])
            if apart <= DISAGREEMENT:
                self._share = place
                return z, near
        raise NumericalError(
            f"the outputs' differences at a step and at twice that step differ by {apart:.1%}, "
            f"more than {DISAGREEMENT:.0%}, at each of {len(SHARES)} steps: along the rounding "
            "errors the model is not smooth, or its numbers are too coarse. Run it in float32 or "
            f"float64. Forward mode: {self.reason or 'not tried.'}"
        )

    def _step(self) -> float:
        """Return cbrt(eps) |w| / |dW|: at that share of dW weights change by cbrt(eps) of them."""
        size = norm([_value(self.model.module, name) for name in self.errors])
        length = norm(list(self.errors.values()))
        return float(self._eps() ** (1 / 3)) * (size or 1.0) / (length or 1.0)

    def _eps(self) -> float:
        return max((float(torch.finfo(e.dtype).eps) for e in self.errors.values()), default=2**-23)

    def _quotient(self, part: Batch, step: float) -> Tensor:
        """Return [z(e) - z(-e)] / 2e."""
        ahead, behind = self._sides(part, step)
        return (ahead - behind) / (2 * step)

    def _sides(self, part: Batch, step: float) -> tuple[Tensor, Tensor]:
        """Return the logits at w + e dW and at w - e dW, inputs moved likewise."""
        made = []
        for e in (step, -step):
            with _moved(self.model.module, self.errors, e), self._moved_inputs(e):
                made.append(counted_logits(self.model.module, part, self.model.device))
        return made[0], made[1]

    def _notes_change(self, layer: str, module: nn.Module, quantizer: InputQuantizer) -> Hook:
        noted = self._changes.setdefault(module, [])

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            value = first_input(layer, inputs)
            noted.append(quantizer(value) - value)

        return hook

    @contextmanager
    def _moved_inputs(self, step: float) -> Iterator[None]:
        """Move inputs by a share of what rounding changes them by in the original model."""

        def make(layer: str, module: nn.Module, quantizer: InputQuantizer) -> Hook:
            calls = iter(self._changes[module])

            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                return first_input(layer, inputs) + step * next(calls), *inputs[1:]

            return hook

        with _hooked(make, self.roundings):
            yield


@contextmanager
def _hooked(
    make: Callable[[str, nn.Module, InputQuantizer], Hook], roundings: Sequence[Rounding]
) -> Iterator[None]:
    """Put a hook before every module that is given rounded inputs."""
    handles: list[RemovableHandle] = []
    try:
        for layer, module, quantizer in roundings:
            hook = make(layer, module, quantizer)
            handles.append(module.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _moved(module: nn.Module, errors: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """Let the weights be w + step dW; their own storage is never written to."""
    parameters = {name: module.get_parameter(name) for name in errors}
    storage = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = storage[name].add(errors[name], alpha=step)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = storage[name]


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    made: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return made


def _apart(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    value, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return value, tangent


def _value(module: nn.Module, name: str) -> Tensor:
    return module.get_parameter(name).detach()


def counted_logits(module: nn.Module, part: Batch, device: torch.device) -> Tensor:
    """Return the logits of the counted predictions, (n, V)."""
    return predictions(module, part, device)[part.predicts.to(device)]
