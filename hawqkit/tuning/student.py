"""The network that is tuned: a copy in float32 that computes with rounded weights and inputs.

Its parameters hold the unrounded weights. Once a step every layer's weight is rounded into a tensor
that stands in front of the parameter, as a plain attribute of the module; gradients gather on that
tensor and go through the rounding once. The module's class, its parameters and their names stay
what they were, tied weights stay tied, and a layer that is called often is rounded once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hawqkit import distributed
from hawqkit.errors import InputError
from hawqkit.formats import Format
from hawqkit.models.batch import Data, predictions
from hawqkit.models.fixed_scales import FixedScales
from hawqkit.models.model import LoadedModel
from hawqkit.models.orientation import as_rows, from_rows
from hawqkit.quantize.apply import check_mix
from hawqkit.quantize.input_rounding import (
    InputQuantizer,
    first_input,
    input_modules,
    input_quantizer,
    real_entries,
)
from hawqkit.quantize.rounding import round_into, scale_dtype_for, scales_of
from hawqkit.records import ActivationRanges, Grid, Layer
from hawqkit.tuning.fake_quantize import first_steps, round_input, round_weight
from hawqkit.tuning.settings import TuneSettings

# A step that training drives to zero, or through it, would make all codes the outermost ones.
SMALLEST_STEP = 2.0**-10  # of what it began with


class Student:
    """A network in training, and the rounding in front of it.

    Attributes:
        module: the copy; its parameters want gradients.
        weights: the layers whose weights are rounded.
        inputs: those whose inputs are rounded.
    """

    def __init__(
        self,
        model: LoadedModel,
        mix: Mapping[str, str],
        settings: TuneSettings,
        *,
        rounding: str,
        activations: ActivationRanges | None,
    ) -> None:
        """Copy the network, and put the rounding of a mix in front of it.

        Args:
            model: the original, which is not changed.
            mix: layer name -> format name.
            settings: which scales are learned, and where they begin.
            rounding: of scales that are not learned: `nearest` or `searched`.
            activations: ranges of the layers' inputs; needed where a format has bits for them.

        Raises:
            InputError: the mix does not fit, or ranges are missing.
            NumericalError: a weight holds NaN or infinity.
        """
        formats = check_mix(model, mix)
        self.module = _trainable(model.module)
        self.weights = [
            _RoundedWeight(self.module, layer, formats[layer.name], settings, rounding)
            for layer in model.layers
            if layer.name in formats and formats[layer.name].quantizes
        ]
        self.inputs = _rounded_inputs(self.module, model.layers, formats, activations, settings)
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(wanted) for wanted in self.inputs
            for module in wanted.modules
        ]  # fmt: skip

    def trained(self) -> dict[str, nn.Parameter]:
        """Return everything that an optimizer changes, by name: parameters, steps, input steps."""
        found = {
            f"parameter/{name}": p for name, p in self.module.named_parameters() if p.requires_grad
        }
        found |= {f"scale/{w.name}": w.step for w in self.weights if w.step is not None}
        return found | {f"input/{i.name}": i.step for i in self.inputs if i.step is not None}

    @torch.no_grad()
    def begin_as_lsq(self, data: Data, parts: Sequence[Sequence[int]]) -> None:
        """Begin every learned step of inputs with `2 mean|x| / sqrt(Q)` (LSQ, section 2.1).

        x are the inputs of some examples, unrounded; Q is the larger number of levels on a side of
        zero. Padded positions are not seen. Every process runs its share.
        """
        learned = [wanted for wanted in self.inputs if wanted.step is not None]
        if not learned:
            return
        device = next(self.module.parameters()).device
        for wanted in learned:
            wanted.seen = torch.zeros(2, dtype=torch.float64, device=device)
        for part in distributed.processes().mine(parts):
            batch = data.micro_batch(part)
            for wanted in learned:
                wanted.attention = batch.attention
            predictions(self.module, batch, device)
        for wanted in learned:
            assert wanted.seen is not None
            total, count = distributed.reduce_sum(wanted.seen).tolist()
            wanted.seen = wanted.attention = None
            if total > 0:
                grid = wanted.grid()
                levels = max(grid.zero, grid.largest - grid.zero)
                wanted.begin(2 * total / count / math.sqrt(levels))

    def round(self) -> None:
        """Round every weight as it is now; call it before the forward passes of a step."""
        for weight in self.weights:
            weight.round()

    def pull(self) -> None:
        """Take the gradients that the rounded weights have gathered through the rounding."""
        ready = [w for w in self.weights if w.rounded is not None and w.leaf is not None]
        some = [(w.rounded, w.leaf.grad) for w in ready if w.leaf is not None]
        known = [(r, g) for r, g in some if r is not None and g is not None]
        if known:
            torch.autograd.backward([r for r, _ in known], [g for _, g in known])

    @torch.no_grad()
    def hold(self) -> None:
        """Keep every learned step on its side of zero, at least `SMALLEST_STEP` of its start."""
        learned = [(w.step, w.start) for w in self.weights]
        learned += [(i.step, i.start) for i in self.inputs]
        for step, start in learned:
            if step is not None and start is not None:
                sign = torch.sign(start)
                step.copy_(sign * torch.maximum(step * sign, start.abs() * SMALLEST_STEP))

    def release(self) -> nn.Module:
        """Take all rounding away, and return the network with its unrounded weights."""
        for weight in self.weights:
            weight.release()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.module.requires_grad_(False)
        return self.module


class _RoundedWeight:
    """One layer's weight with the tensor that stands in front of it."""

    def __init__(
        self, module: nn.Module, layer: Layer, format: Format, settings: TuneSettings, rounding: str
    ) -> None:
        self.name, self.format, self._rounding = layer.name, format, rounding
        self.owner = module.get_submodule(layer.name)
        self._users = [module.get_submodule(name) for name in (layer.name, *layer.tied)]
        self.parameter = self.owner.get_parameter("weight")
        self.scale_dtype = scale_dtype_for(layer.dtype)
        self.step: nn.Parameter | None = None
        self.start: Tensor | None = None
        self._zeros: Tensor | None = None
        self.rounded: Tensor | None = None
        self.leaf: Tensor | None = None
        if settings.learns_weights:
            steps, self._zeros = first_steps(
                as_rows(self.parameter.detach(), self.owner),
                format,
                start=settings.start,
                rounding=rounding,
                scale_dtype=self.scale_dtype,
            )
            self.step, self.start = nn.Parameter(steps), steps.clone()

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """Return scales and zero points as they are stored."""
        if self.step is not None:
            return self.step.detach().to(self.scale_dtype), self._zeros
        rows = as_rows(self.parameter.detach(), self.owner)
        return scales_of(rows, self.format, rounding=self._rounding, scale_dtype=self.scale_dtype)

    def round(self) -> None:
        """Put the rounded weight in front of the parameter, ready to gather gradients."""
        scales, zeros = self.scales()
        with torch.enable_grad():
            rows = round_weight(
                as_rows(self.parameter, self.owner), self.format, scales, zeros, self.step
            )
            self.rounded = from_rows(rows, self.owner)
        self.leaf = self.rounded.detach().requires_grad_()
        for user in self._users:
            # In the instance's own dictionary: found before the parameter of the same name, which
            # nn.Module's __setattr__ would refuse to replace.
            vars(user)["weight"] = self.leaf

    @torch.no_grad()
    def finish(self) -> FixedScales:
        """Leave the rounded values in the parameter, and return what they lie on."""
        scales, zeros = self.scales()
        rows = as_rows(self.parameter.detach(), self.owner)
        wide = torch.promote_types(rows.dtype, torch.float32)
        values = torch.empty(rows.shape, dtype=wide, device=rows.device)
        round_into(values, rows, scales, zeros, self.format)
        self.parameter.data = from_rows(values, self.owner).to(rows.dtype)
        return FixedScales(self.format.weights.name, scales, zeros)

    def release(self) -> None:
        """Take the rounded weight away."""
        for user in self._users:
            vars(user).pop("weight", None)
        self.rounded = self.leaf = None


@dataclass(slots=True, eq=False)
class _RoundedInput:
    """The inputs of one layer: a hook on every module that computes with its weight."""

    name: str
    modules: list[nn.Module]
    quantizers: dict[int, InputQuantizer]
    bits: int
    step: nn.Parameter | None = None
    start: Tensor | None = None
    seen: Tensor | None = None  # sum of |x| and count, while a first step is looked for
    attention: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with the first one rounded."""
        values = first_input(self.name, inputs)
        if self.seen is not None:
            real = real_entries(values, self.attention)
            self.seen += torch.stack([real.abs().sum(dtype=torch.float64), _count(real)])
            return inputs
        return round_input(values, self.quantizers[id(module)], self.step), *inputs[1:]

    def grid(self) -> Grid:
        """Return the grid that the inputs are rounded to now.

        Raises:
            InputError: every token has its own.
        """
        grid = self.quantizers[id(self.modules[0])].grid
        if grid is None:
            raise InputError(f"layer {self.name!r}: its inputs have a grid for each token.")
        return grid if self.step is None else replace(grid, scale=float(self.step.detach()))

    def begin(self, scale: float) -> None:
        """Learn the scale of the grid from here on."""
        device = next(self.modules[0].parameters()).device
        self.step = nn.Parameter(torch.tensor(scale, dtype=torch.float32, device=device))
        self.start = self.step.detach().clone()


def _count(values: Tensor) -> Tensor:
    return torch.tensor(values.numel(), dtype=torch.float64, device=values.device)


def _trainable(module: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose numbers are wide enough to be trained."""
    made = copy.deepcopy(module).eval()
    narrow = {p.dtype for p in made.parameters()} & {torch.float16, torch.bfloat16}
    if narrow:
        made = made.float()
    for parameter in made.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return made


def _rounded_inputs(
    module: nn.Module,
    layers: Sequence[Layer],
    formats: Mapping[str, Format],
    ranges: ActivationRanges | None,
    settings: TuneSettings,
) -> list[_RoundedInput]:
    found: list[_RoundedInput] = []
    problems: list[str] = []
    for layer in layers:
        format = formats.get(layer.name)
        modules = input_modules(module, layer)
        if format is None or format.activation_bits is None or not modules:
            continue
        bits = format.activation_bits
        if ranges is None:
            problems.append(
                f"layer {layer.name!r}: {format.name!r} rounds its inputs, and no ranges came; "
                "give an allocation that was made with them."
            )
            continue
        quantizers = {id(m): input_quantizer(ranges, layer.name, m, bits) for m in modules}
        made = _RoundedInput(layer.name, modules, quantizers, bits)
        grid = quantizers[id(modules[0])].grid
        if settings.learns_inputs and grid is None:
            problems.append(
                f"layer {layer.name!r}: its inputs have a grid for each token, made of the token "
                "itself, so there is no scale to learn; calibrate static ranges, or set "
                "learned_scales to none or weights."
            )
        if settings.learns_inputs and grid is not None:
            made.begin(grid.scale)
        found.append(made)
    if settings.learned_scales == "inputs" and not found and not problems:
        problems.append(
            "tune: learned_scales is 'inputs', and no format of the mix rounds inputs; use none or "
            "weights."
        )
    if problems:
        raise InputError("\n".join(["tune:", *problems]) if len(problems) > 1 else problems[0])
    return found
