"""Batch norm folded into the layer before it, where the outputs stay equal.

In evaluation mode a batch norm is affine per channel, so behind a linear layer it vanishes into it:

    W' = s W,  b' = s (b - mean) + beta,  s = gamma / sqrt(var + eps), one number per output channel

(Jacob et al. 2018, arXiv:1712.05877, equation 14). Which layer a norm follows is not read from
names but seen in a run on real inputs; then the whole network is run in float64 before and after,
and what changes an output is undone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hawqkit.errors import InputError, NumericalError
from hawqkit.models.batch import Data
from hawqkit.models.following import Inputs, foldable, run, watch
from hawqkit.models.model import LoadedModel, recounted
from hawqkit.models.orientation import as_rows, from_rows

# A float64 run rounds at 1.1e-16; some 1e4 of that is what a hundred layers may add up to. A norm
# folded where it must not be changes outputs by far more than any rounding.
TOLERANCE = 1e-11


@dataclass(frozen=True, slots=True)
class Folding:
    """What became of every batch norm of a model.

    Attributes:
        folded: norm -> the layer that it is part of now; an `nn.Identity` stands in its place.
        left: norm -> why it stays.
        difference: largest change of an output over the largest output, in the model's own
            arithmetic: what rounding the folded weights to their dtype costs.
    """

    folded: dict[str, str]
    left: dict[str, str]
    difference: float


def fold_batch_norms(module: nn.Module, example_inputs: Inputs) -> Folding:
    """Fold every batch norm that directly follows a convolution or Linear, in place.

    A norm is folded if, in a run on `example_inputs`, its input is always the untouched output of
    one and the same layer, nothing else reads that output, and the outputs of the whole network in
    float64 stay equal to 1e-11 of the largest. Everything else is left, with the reason.

    Args:
        module: the network, in evaluation mode. Weights and biases of layers change; norms become
            `nn.Identity`.
        example_inputs: its input, or a mapping of keyword arguments. Real ones: an all-zero input
            hides what folding changes.

    Raises:
        InputError: a batch norm is in training mode, or was never run, so that its statistics are
            those of no data.
        NumericalError: the outputs on `example_inputs` are not finite.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    >>> _ = net[1].running_mean.fill_(0.5)
    >>> fold_batch_norms(net.eval(), torch.ones(1, 1, 5, 5)).folded
    {'1': '0'}
    """
    norms = batch_norms(module)
    _refuse(norms)
    if not norms:
        return Folding({}, {}, 0.0)
    sight = watch(module, example_inputs)
    if not all(bool(torch.isfinite(t).all()) for t in sight.outputs):
        raise NumericalError(
            "batch norm cannot be folded: the outputs on the example inputs hold NaN or infinity, "
            "so nothing can be compared; give other inputs, or a wider dtype."
        )
    pairs, left = foldable(module, norms, sight)
    pairs = _verified(module, example_inputs, pairs, left)
    for norm, layer in pairs.items():
        _Fold(module, layer, norm).do()
    after = run(module, example_inputs)
    order = {name: place for place, name in enumerate(norms)}
    return Folding(
        folded=dict(sorted(pairs.items(), key=lambda item: order[item[0]])),
        left=dict(sorted(left.items(), key=lambda item: order[item[0]])),
        difference=_difference(sight.outputs, after),
    )


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return every batch norm of a model by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, _BatchNorm)}


def never_run(module: nn.Module) -> tuple[str, ...]:
    """Return the batch norms whose statistics are still the initial ones: mean 0 and variance 1.

    `num_batches_tracked` is not asked: checkpoints converted from elsewhere leave it at 0.

    >>> never_run(nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2)))
    ('1',)
    """
    return tuple(name for name, norm in batch_norms(module).items() if _untouched(norm))


def _untouched(norm: _BatchNorm) -> bool:
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        return False
    return bool((mean == 0).all()) and bool((var == 1).all())


def _refuse(norms: Mapping[str, _BatchNorm]) -> None:
    problems = []
    training = [name for name, norm in norms.items() if norm.training]
    if training:
        problems.append(
            f"{_some(training)}: in training mode, where a batch norm follows each batch and "
            "cannot be folded; call .eval() on the model first."
        )
    fresh = [name for name, norm in norms.items() if _untouched(norm)]
    if fresh:
        problems.append(
            f"{_some(fresh)}: batch norm that was never run (its running mean is 0 and its "
            "variance 1 everywhere, as it was made); train the model, load its statistics, or run "
            "data through it in training mode first."
        )
    if problems:
        raise InputError("batch norm cannot be folded: " + "; ".join(problems))


def _some(names: Sequence[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return s and beta - s mean of a norm in float64 on the CPU; one entry per channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, scale = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    scale = (scale + norm.eps).rsqrt()
    if not norm.affine:
        return scale, -scale * mean
    scale = scale * norm.get_parameter("weight").detach().cpu().double()
    return scale, norm.get_parameter("bias").detach().cpu().double() - scale * mean


class _Fold:
    """One norm going into one layer, and out again."""

    def __init__(self, module: nn.Module, layer: str, norm: str) -> None:
        self.module = module
        self.layer: Any = cast("Any", module.get_submodule(layer))
        self.norm = module.get_submodule(norm)
        self.weight: Tensor = self.layer.weight.detach().clone()
        self.bias: nn.Parameter | None = self.layer.bias
        self.names = [n for n, m in module.named_modules(remove_duplicate=False) if m is self.norm]

    @torch.no_grad()
    def do(self) -> None:
        assert isinstance(self.norm, _BatchNorm)
        scale, shift = _affine(self.norm)
        rows = as_rows(self.weight.cpu().double(), self.layer) * scale[:, None]
        self.layer.weight.copy_(from_rows(rows, self.layer))
        if self.bias is not None:
            shift = shift + scale * self.bias.cpu().double()
        # A parameter of its own: the old bias may be shared, and undoing puts it back.
        self.layer.bias = nn.Parameter(
            shift.to(self.weight.device, self.weight.dtype),
            requires_grad=self.layer.weight.requires_grad,
        )
        place = nn.Identity().train(self.norm.training)
        for name in self.names:
            self.module.set_submodule(name, place)

    @torch.no_grad()
    def undo(self) -> None:
        self.layer.weight.copy_(self.weight)
        self.layer.bias = self.bias
        for name in self.names:
            self.module.set_submodule(name, self.norm)


def _verified(
    module: nn.Module, inputs: Inputs, pairs: dict[str, str], left: dict[str, str]
) -> dict[str, str]:
    """Return the pairs that leave the outputs equal in float64; the others go to `left`."""
    if not pairs:
        return {}
    exact = deepcopy(module).to("cpu", torch.float64)
    inputs = _as_float64(inputs)
    wanted = run(exact, inputs)
    folds = {norm: _Fold(exact, layer, norm) for norm, layer in pairs.items()}
    for fold in folds.values():
        fold.do()
    if _change(exact, inputs, wanted) is None:
        return pairs
    for fold in folds.values():
        fold.undo()
    kept: dict[str, str] = {}
    for norm, fold in folds.items():
        fold.do()
        if (reason := _change(exact, inputs, wanted)) is None:
            kept[norm] = pairs[norm]
        else:
            fold.undo()
            left[norm] = reason
    return kept


def _change(exact: nn.Module, inputs: Inputs, wanted: Sequence[Tensor]) -> str | None:
    """Return what is wrong with the outputs now, None if they are equal."""
    try:
        difference = _difference(wanted, run(exact, inputs))
    # The model's own code, where a norm is gone that it asks for more than its output.
    except Exception as error:
        return f"without it the model fails: {type(error).__name__}: {error}"
    if difference <= TOLERANCE:
        return None
    return f"folding it changes the outputs, by {difference:.1e} of the largest"


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest change over the largest value; infinity where shapes differ."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    largest = max((t.double().abs().max().item() for t in before if t.numel()), default=0.0)
    change = max(
        (
            (a.double().cpu() - b.double().cpu()).abs().max().item()
            for a, b in zip(before, after, strict=True)
            if a.numel()
        ),
        default=0.0,
    )
    return change / largest if largest else float(change > 0)


def _as_float64(inputs: Inputs) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: _wide(value) for name, value in inputs.items()}
    return _wide(inputs)  # type: ignore[no-any-return]


def _wide(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.cpu().double() if value.is_floating_point() else value.cpu()


def with_folded_batch_norms(model: LoadedModel, data: Data) -> tuple[LoadedModel, Folding]:
    """Fold a loaded model's batch norms, and count again what it consists of.

    Args:
        model: its module is changed in place, so the old `LoadedModel` no longer describes it.
        data: the first two examples show which norm follows which layer, see `fold_batch_norms`.

    Raises:
        InputError: a batch norm was never run.
        NumericalError: the model's outputs on these examples are not finite.
    """
    batch = data.micro_batch(range(min(2, len(data))))
    folding = fold_batch_norms(model.module, batch.inputs(model.device))
    dtypes = {layer.name: layer.dtype for layer in model.layers}
    biases = {f"{n}.bias": dtypes[n] for n in folding.folded.values() if n in dtypes}
    return recounted(model, biases), folding
