"""What tuning leaves behind: a model of rounded weights, their scales, and ranges of inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hawqkit.models.model import LoadedModel, with_values
from hawqkit.records import (
    ActivationRanges,
    Allocation,
    Grid,
    LayerRange,
    LearnedScale,
    Tuning,
)
from hawqkit.store import fingerprint, to_plain
from hawqkit.tuning.student import SMALLEST_STEP, Student
from hawqkit.validation.measuring import Variant

_NAMED = 3  # layers that a warning names


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """A tuned model.

    Attributes:
        model: the tuned network. Every layer of the mix holds rounded values, exactly those that a
            checkpoint of the mix decodes to; `model.scales` says what they lie on, so that exports
            and `quantize.apply` take these scales.
        mix: layer name -> format name.
        rounding: of scales that were not learned.
        activations: ranges of the layers' inputs, as tuning left them; None where no format rounds
            inputs.
        unrounded: layer name -> the trained weight before rounding, in its parameter's shape.
        record: how it was tuned, and what it changed.
        allocation: the allocation whose mix this is, made to fit the tuned model: its hash and its
            ranges; None where a bare mix was tuned.
        taken: whether it was read from a folder and not trained now.
    """

    model: LoadedModel
    mix: dict[str, str]
    rounding: str
    activations: ActivationRanges | None
    unrounded: dict[str, Tensor]
    record: Tuning
    allocation: Allocation | None = None
    taken: bool = False

    def variant(self) -> Variant:
        """Return the tuned model as something that validation measures beside the original."""
        return Variant(self.model, self.mix, self.activations)

    @torch.no_grad()
    def unrounded_model(self) -> LoadedModel:
        """Return a copy with the trained weights before rounding, to be probed or quantized anew.

        Rounded in the formats of the mix with these scales, it is the tuned model.
        """
        module = copy.deepcopy(self.model.module)
        for name, values in self.unrounded.items():
            module.get_submodule(name).get_parameter("weight").data = values.clone()
        return with_values(self.model, module)


@torch.no_grad()
def finish(
    student: Student, model: LoadedModel, activations: ActivationRanges | None
) -> tuple[LoadedModel, dict[str, Tensor], ActivationRanges | None]:
    """Take the rounding off a trained network and put it into its weights.

    Every tensor is rounded to the dtype that it is stored in first: what is measured is what a
    checkpoint holds.

    Args:
        student: the trained network; it becomes the tuned model's.
        model: the original.
        activations: the ranges that training began with.

    Returns:
        the tuned model, the unrounded weights of its layers, and its ranges.
    """
    learned = {w.name: w.grid() for w in student.inputs if w.step is not None}
    module = student.release()
    _to_stored(module, model)
    unrounded, scales = {}, {}
    for weight in student.weights:
        unrounded[weight.name] = weight.parameter.detach().clone()
        scales[weight.name] = weight.finish()
    tuned = with_values(model, module, scales)
    return tuned, unrounded, tuned_ranges(activations, tuned.facts.hash, learned)


def tuned_ranges(
    ranges: ActivationRanges | None, model: str, learned: Mapping[str, Grid]
) -> ActivationRanges | None:
    """Return ranges of the tuned model: those that there were, but for the grids that were learned.

    Args:
        ranges: that training began with, None for none.
        model: hash of the tuned model.
        learned: layer name -> the grid of its inputs.
    """
    if ranges is None:
        return None
    layers = dict(ranges.layers)
    for name, grid in learned.items():
        known = layers[name]
        new = {**known.ranges, grid.bits: range_of(grid, symmetric=ranges.symmetric)}
        layers[name] = LayerRange(known.low, known.high, known.count, new)
    found = replace(ranges, model=model, layers=layers, fingerprint="")
    return replace(found, fingerprint=fingerprint(to_plain(found)))


def range_of(grid: Grid, *, symmetric: bool) -> tuple[float, float]:
    """Return the range of which `make_grid` makes exactly this grid.

    The products of a float32 scale and a code are exact in float64, and so is their quotient.

    >>> range_of(Grid(0.5, 3, 4), symmetric=False)
    (-1.5, 6.0)

    Args:
        grid: with a scale that float32 holds.
        symmetric: as in `make_grid`.
    """
    half = 1 << (grid.bits - 1)
    if symmetric and grid.zero == half:
        return -grid.scale * (half - 1), grid.scale * (half - 1)
    return -grid.scale * grid.zero or 0.0, grid.scale * (grid.largest - grid.zero)


@torch.no_grad()
def learned_scales(student: Student) -> tuple[tuple[LearnedScale, ...], tuple[str, ...]]:
    """Return how far the learned scales have moved, and warnings of those that are held."""
    steps = [(w.name, "weight", w.step, w.start) for w in student.weights]
    steps += [(i.name, "input", i.step, i.start) for i in student.inputs]
    found, held = [], []
    for name, what, step, start in steps:
        if step is None or start is None:
            continue
        size = step.detach().double().abs() / start.double().abs()
        found.append(LearnedScale(name, what, step.numel(), float(size.mean()) - 1))
        if bool((size <= SMALLEST_STEP).any()):
            held.append(f"{what} of {name}")
    if not held:
        return tuple(found), ()
    more = f" and {len(held) - _NAMED} more" if len(held) > _NAMED else ""
    warning = (
        f"tune: training drove learned scales to {SMALLEST_STEP:g} of their start, where they are "
        f"held: {', '.join(held[:_NAMED])}{more}; lower the learning rate."
    )
    return tuple(found), (warning,)


def _to_stored(module: nn.Module, model: LoadedModel) -> None:
    """Round every tensor to its stored dtype, and give it the dtype of the original in memory."""
    known = {t.name: getattr(torch, t.dtype) for t in model.facts.tensors}
    for name, layer in ((f"{x.name}.weight", x) for x in model.layers):
        known.setdefault(name, getattr(torch, layer.dtype))
    before = {
        **dict(model.module.named_parameters(remove_duplicate=False)),
        **dict(model.module.named_buffers(remove_duplicate=False)),
    }
    tensors: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        tensors.setdefault(id(tensor), (tensor, []))[1].append(name)
    for tensor, names in tensors.values():
        if tensor.is_floating_point():
            dtype = before[names[0]].dtype
            stored = next((known[n] for n in names if n in known), dtype)
            tensor.data = tensor.data.to(stored).to(dtype)
