"""The curvature at what layers are given: HAWQ-V2's activation traces.

Rounding a layer's input a by da changes the loss by `g_a' da + 1/2 da' H_a da`. The Hessian by all
inputs of a batch is block diagonal over its examples, since in evaluation mode no example reaches
another (Dong et al. 2020, section 3.3), so an example's trace comes from probes over the batch.

Letters: B examples of a batch, m probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from hawqkit.curvature.data import Batches, to_device
from hawqkit.curvature.fisher import Draws
from hawqkit.curvature.layers import Chosen, check_kind, choose_layers
from hawqkit.curvature.objective import Objective
from hawqkit.curvature.of_model import refuse_unknown
from hawqkit.curvature.parameters import choose_parameters
from hawqkit.curvature.passes import differentiable, refuse_training_mode
from hawqkit.distributed import gather, processes
from hawqkit.errors import DataError, InputError, NumericalError, Unsupported
from hawqkit.models.model import LoadedModel
from hawqkit.records.spectral import Estimate

PASS = 8  # probes that a pass over the data adds
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class ActivationTrace:
    """The trace of the curvature at a layer's input.

    Attributes:
        trace: tr(H_a) of the mean loss over predictions; its error is that of the probes.
        entries: numbers that the input of one example has, the mean over examples.
    """

    trace: Estimate
    entries: float

    @property
    def average(self) -> float:
        """HAWQ-V2's average trace, tr(H_a) / entries; Omega is this times |da|^2."""
        return self.trace.value / self.entries


@dataclass(slots=True)
class _Tally:
    """A layer's probes so far: each a sum over all data."""

    sums: list[float] = field(default_factory=list)
    entries: int = 0
    examples: int = 0


def activation_traces(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    layers: Chosen = None,
    kind: str = "hessian",
    relative_error: float = 0.05,
    max_probes: int = 256,
    seed: int = 0,
) -> dict[str, ActivationTrace]:
    """Return the trace of the curvature at the input of every layer.

    With v of random signs at every input, `E v' H_a v = tr(H_a)` (Hutchinson 1990), where `H_a v`
    is the derivative of `g_a' v` by a: no matrix is formed. All layers share a batch's gradient
    graph. For `gauss-newton` the probes are signs x at the outputs, `E |J_a' R x|^2 = n tr(G_a)`
    with L_zz = R R', from one backward pass for all layers. A layer that is called several times
    has the sum over its calls; only the path through that layer counts, although other layers may
    be given the same tensor.

    Args:
        model: a network in evaluation mode.
        objective: the loss.
        batches: as for `hessian`; every batch is one forward pass.
        layers: see `choose_layers`; embeddings, whose inputs are no numbers, are left out.
        kind: `hessian` or `gauss-newton`.
        relative_error: done when every layer's standard error is this share of its magnitude.
        max_probes: it stops here at the latest, and the estimate's note says so.
        seed: of the probes.

    Raises:
        InputError: a layer is unknown, an option is out of range, or no layer has such an input.
        Unsupported: the model is in training mode, or has no second derivative.
        NumericalError: a product is not finite.
        DataError: no prediction counts.
    """
    check_kind(kind)
    if not relative_error > 0 or max_probes < 2:
        raise InputError(
            f"relative_error {relative_error}, max_probes {max_probes}: the first must be above 0, "
            "the other at least 2."
        )
    if kind == "gauss-newton" and objective.root is None:
        raise Unsupported(
            f"the {objective.name} gives no root of its curvature by the outputs, which the "
            "Gauss-Newton trace needs; give `root` to Objective, or take kind='hessian'."
        )
    module = refuse_unknown(model)
    refuse_training_mode(module)
    names = list(choose_layers(model, layers))
    parameters = choose_parameters(module, [_owner(module, n) for n in names])
    data, tallies = Batches(batches), {name: _Tally() for name in names}
    pass_of = _hessian_pass if kind == "hessian" else _gauss_newton_pass
    drawn, count = 0, 0.0
    while drawn < max_probes and not _done(tallies, relative_error):
        more = min(PASS, max_probes - drawn)
        totals = {name: np.zeros(more) for name in names}
        count = 0.0
        for number, example, batch in processes().mine(data):
            batch = to_device(batch, parameters.device)
            with (
                differentiable(module, parameters, twice=kind == "hessian"),
                _tapped(module, names) as taken,
            ):
                count += pass_of(
                    module, objective, batch, taken, totals, (seed, drawn, more, example, number)
                )
            if drawn == 0:
                for name, inputs in taken.items():
                    tallies[name].entries += sum(a.numel() for a in inputs)
                    tallies[name].examples += len(inputs[0]) if inputs else 0
        drawn += more
        count = _shared(totals, count)
        for name, values in totals.items():
            tallies[name].sums += values.tolist()
    return _results(tallies, count, relative_error)


def _owner(module: nn.Module, name: str) -> nn.Parameter:
    return module.get_submodule(name).get_parameter("weight")


def _done(tallies: dict[str, _Tally], relative_error: float) -> bool:
    for tally in tallies.values():
        values = np.asarray(tally.sums)
        if len(values) < 2:
            return False
        if values.std(ddof=1) / len(values) ** 0.5 > relative_error * abs(values.mean()):
            return False
    return True


@contextmanager
def _tapped(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Give every call of a layer an input of its own in the graph, and collect these inside."""
    taken: dict[str, list[Tensor]] = {name: [] for name in names}
    anchor = torch.ones((), requires_grad=True)

    def hook_of(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            first = inputs[0]
            if not isinstance(first, Tensor) or not first.is_floating_point():
                return inputs
            # Another node than the tensor that came, which other layers may be given too.
            own = first * anchor.to(first)
            taken[name].append(own)
            return (own, *inputs[1:])

        return hook

    handles = [module.get_submodule(n).register_forward_pre_hook(hook_of(n)) for n in names]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


Key = tuple[int, int, int, int, int]


def _hessian_pass(
    module: nn.Module,
    objective: Objective,
    batch: Any,
    taken: dict[str, list[Tensor]],
    totals: dict[str, Any],
    key: Key,
) -> float:
    """Add `v' H v` of one batch to each layer's new probes; return its counted predictions."""
    total, count = objective.loss(objective.outputs(module, batch), batch)
    inputs = [a for some in taken.values() for a in some]
    found = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
    gradient_of = {id(a): g for a, g in zip(inputs, found, strict=True)}
    seed, drawn, more, example, _ = key
    for place, (name, some) in enumerate(taken.items()):
        used = [(a, g) for a in some if (g := gradient_of[id(a)]) is not None and g.requires_grad]
        if not used:
            continue
        for probe in range(more):
            vectors = [
                _signs(a, (seed, drawn + probe, place, call), example)
                for call, (a, _) in enumerate(used)
            ]
            # Calls are rounded together, but their traces are those of each by itself.
            for (a, g), v in zip(used, vectors, strict=True):
                (product,) = torch.autograd.grad(g, a, v, retain_graph=True, allow_unused=True)
                if product is not None:
                    totals[name][probe] += float((v * product).double().sum())
        _refuse(name, totals[name], key)
    return float(count)


def _gauss_newton_pass(
    module: nn.Module,
    objective: Objective,
    batch: Any,
    taken: dict[str, list[Tensor]],
    totals: dict[str, Any],
    key: Key,
) -> float:
    """Add `|J' R x|^2` of one batch to each layer's new probes; return its counted predictions."""
    assert objective.root is not None
    z = objective.outputs(module, batch)
    _, count = objective.loss(z, batch)
    inputs = [a for some in taken.values() for a in some]
    seed, drawn, more, example, _ = key
    for probe in range(more):
        with torch.no_grad():
            x = objective.root(z.detach(), batch, _signs(z, (seed, drawn + probe), example))
        found = torch.autograd.grad(z, inputs, x, retain_graph=True, allow_unused=True)
        gradients = iter(found)
        for name, some in taken.items():
            for _ in some:
                g = next(gradients)
                if g is not None:
                    totals[name][probe] += float(g.double().square().sum())
    for name, values in totals.items():
        _refuse(name, values, key)
    return float(count)


def _signs(like: Tensor, seed: tuple[int, ...], example: int) -> Tensor:
    """Return random signs of a tensor's shape, each example's own by its place in the data."""
    draws = Draws(seed, example)
    rows = [draws(b, tuple(like.shape[1:]), normal=False) for b in range(len(like))]
    return (torch.stack(rows) < 0.5).to(like.device, like.dtype).mul_(2).sub_(1)


def _refuse(name: str, values: Any, key: Key) -> None:
    if not np.isfinite(values).all():
        raise NumericalError(
            f"the curvature at the input of layer {name} is not finite in batch {key[4]} (counted "
            "from 0); check its inputs, or run the model in float32 if half precision overflows."
        )


def _shared(totals: dict[str, Any], count: float) -> float:
    """Add up all processes' sums in place, and return their count."""
    parts = gather((totals, count))
    for name in totals:
        totals[name] = np.sum([part[name] for part, _ in parts], axis=0)
    return float(sum(c for _, c in parts))


def _results(
    tallies: dict[str, _Tally], count: float, relative_error: float
) -> dict[str, ActivationTrace]:
    if count == 0:
        raise DataError("no prediction counts in any batch, so the mean loss is not defined.")
    sizes = gather({name: (tally.entries, tally.examples) for name, tally in tallies.items()})
    found = {}
    for name, tally in tallies.items():
        numbers = sum(part[name][0] for part in sizes)
        examples = sum(part[name][1] for part in sizes)
        if numbers == 0:
            continue
        values = np.asarray(tally.sums) / count
        stderr = float(values.std(ddof=1) / len(values) ** 0.5)
        value = float(values.mean())
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stderr
        open_ = stderr > relative_error * abs(value)
        trace = Estimate(
            value=value,
            stderr=stderr,
            samples=len(values),
            products=len(values),
            method="hutchinson at the input",
            interval=(value - reach, value + reach),
            note="stopped at max_probes, above the relative error asked for" if open_ else "",
        )
        found[name] = ActivationTrace(trace, numbers / examples)
    if not found:
        raise InputError("none of the layers is given numbers that could be rounded.")
    return found
