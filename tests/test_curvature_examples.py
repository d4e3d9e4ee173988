"""Probes of which every example has its own: where they are allowed, and what they give."""

from __future__ import annotations

from collections.abc import Callable

import curvature_oracles as oracles
import numpy as np
import pytest
import torch
from curvature_oracles import Case
from torch import Tensor, nn

from hawqkit.curvature.layer_traces import layer_traces
from hawqkit.curvature.layers import choose_layers
from hawqkit.curvature.linear_maps import LinearMap, linear_maps, uses_of
from hawqkit.curvature.objective import cross_entropy
from hawqkit.spectrum.per_layer import layer_frobenius_norms

KINDS = ("hessian", "gauss-newton")


class Residual(nn.Module):
    """x + f(x), or what a function makes of a module."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.module, x)


class Attention(nn.Module):
    """One head over the positions of (B, T, D), with queries, keys and values in one weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fused = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.fused(x).chunk(3, -1)
        return (3 * q @ k.transpose(1, 2)).softmax(-1) @ v


def case_of(model: nn.Module, x: Tensor, classes: int = 3, cuts: tuple[int, ...] = (4,)) -> Case:
    """Return a classifier's case with its data in uneven batches."""
    model = oracles.filled(model.double(), scale=2.0)
    y = torch.arange(len(x)) % classes
    pieces = zip(x.tensor_split(cuts), y.tensor_split(cuts), strict=True)
    return Case(model, list(pieces), lambda m: m(x), y, oracles.all_names(model))


def image(*layers: nn.Module, channels: int) -> Case:
    body = [*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]
    return case_of(nn.Sequential(*body), oracles.noise(7, 2, 5, 6, seed=5))


def line(*layers: nn.Module, channels: int) -> Case:
    body = [*layers, nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, 3)]
    return case_of(nn.Sequential(*body), oracles.noise(7, 2, 9, seed=5))


def dense(*layers: nn.Module, width: int = 6) -> Case:
    model = nn.Sequential(nn.Linear(4, width), *layers, nn.Linear(width, 3))
    return case_of(model, oracles.noise(9, 4, seed=5))


def truths(case: Case, kind: str) -> dict[str, tuple[float, float]]:
    """Return trace and Frobenius norm of each layer's dense block."""
    make = oracles.dense_hessian if kind == "hessian" else oracles.dense_gauss_newton
    matrix, places = make(case), oracles.places(case)
    blocks = {
        layer: matrix[places[names[0]], places[names[0]]].detach()
        for layer, names in choose_layers(case.model).items()
    }
    return {layer: (float(B.trace()), float(B.norm())) for layer, B in blocks.items()}


def in_place() -> Case:
    return dense(nn.SELU(inplace=True))


def summed(m: nn.Module, x: Tensor) -> Tensor:
    """Put the positions of all examples into one axis."""
    return m(x.flatten(0, 1)).unflatten(0, x.shape[:2]).tanh().mean(1)


def sequences(function: Callable[[nn.Module, Tensor], Tensor]) -> Case:
    model = nn.Sequential(Residual(nn.Linear(4, 5), function), nn.Linear(5, 3))
    return case_of(model, oracles.noise(6, 3, 4, seed=5))


def mixing(m: nn.Module, x: Tensor) -> Tensor:
    y = torch.tanh(m(x))
    return y + y.roll(1, 0)  # an example's outputs depend on another


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("make", "apart"),
    [
        (lambda: dense(nn.Tanh()), {"0", "2"}),
        (in_place, {"0", "2"}),
        (lambda: image(nn.Conv2d(2, 4, 3, stride=2, padding=1), channels=4), {"0", "4"}),
        (lambda: image(nn.Conv2d(2, 4, (1, 3), dilation=(1, 2)), channels=4), {"0", "4"}),
        (lambda: line(nn.Conv1d(2, 4, 3, stride=2, padding=1), channels=4), {"0", "4"}),
        # Below: the head alone, or nothing, has a probe an example.
        (lambda: image(nn.Conv2d(2, 4, 3, groups=2), channels=4), {"4"}),
        (lambda: line(nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), channels=4), {"4"}),
        (lambda: dense(Residual(nn.Linear(6, 6), lambda m, x: m(m(x).tanh()))), {"0", "2"}),
        (lambda: dense(Residual(nn.Linear(6, 6), lambda m, x: m(x) + x @ m.weight)), {"0", "2"}),
        (lambda: sequences(summed), {"1"}),
    ],
)
def test_traces_with_and_without_probes_of_examples(
    make: Callable[[], Case], apart: set[str], kind: str
) -> None:
    case = make()
    found = layer_traces(case.model, cross_entropy(), case.batches, kind=kind, relative_error=0.04)
    assert {n for n, e in found.items() if "a probe an example" in e.method} == apart
    for layer, (trace, _) in truths(case, kind).items():
        assert abs(found[layer].value - trace) <= 4 * found[layer].stderr, layer
        # Some traces are near zero.
        assert found[layer].relative_error <= 0.04 or "max_probes" in found[layer].note, layer


def test_examples_that_meet_share_their_probes() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Residual(nn.Linear(6, 6), mixing), nn.Linear(6, 3))
    case = case_of(model, oracles.noise(5, 4, seed=5), cuts=())
    found = layer_traces(case.model, cross_entropy(), case.batches)
    assert {n for n, e in found.items() if "a probe an example" in e.method} == {"2"}
    for layer, (trace, _) in truths(case, "hessian").items():
        assert abs(found[layer].value - trace) <= 4 * found[layer].stderr


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_cover_with_few_probes_an_example(kind: str) -> None:
    """Four probes of eight examples: the spread within the examples tells the error."""
    model = nn.Conv2d(2, 4, 3, stride=2), nn.Softplus()
    case = image(*model, channels=4)
    truth = truths(case, kind)
    covered = []
    for seed in range(150):
        found = layer_traces(
            case.model,
            cross_entropy(),
            case.batches,
            kind=kind,
            relative_error=1e-9,
            max_probes=4,
            seed=seed,
        )
        covered += [found[layer].covers(trace) for layer, (trace, _) in truth.items()]
    # 300 of them: three standard errors of a share of 0.95 are 0.038.
    assert np.mean(covered) >= 0.95 - 0.038


def test_variances_are_those_of_the_dense_blocks() -> None:
    """Shared signs v vary by 2 |H|_F^2 without the diagonal; examples' own by the sum of theirs."""
    case = dense(nn.Tanh())
    options = {"relative_error": 1e-9, "max_probes": 256}
    own = layer_traces(case.model, cross_entropy(), case.batches, layers=["0"], **options)["0"]
    groups = {"0": ["0.weight", "0.bias"]}  # two parameters are no linear map
    shared = layer_traces(case.model, cross_entropy(), case.batches, layers=groups, **options)["0"]
    whole = oracles.dense_hessian(case)
    places = oracles.places(case)
    index = torch.arange(len(whole))[places["0.weight"].start : places["0.bias"].stop]
    H = whole[index][:, index]
    expected = 2 * float(H.square().sum() - H.diagonal().square().sum())
    # A variance of 256 samples has a standard error of a tenth, or more, as they are not normal.
    assert shared.stderr**2 * shared.samples == pytest.approx(expected, rel=0.4)
    assert own.stderr**2 * own.samples == pytest.approx(_variance(case, "0.weight"), rel=0.4)
    assert own.stderr < 0.8 * shared.stderr


def fused() -> Case:
    """Return small queries and keys: they have no share in the trace, and the most of the norm."""
    pooling = Residual(nn.Linear(6, 3), lambda m, x: m(x.mean(1)))
    case = case_of(nn.Sequential(Attention(6), pooling), oracles.noise(8, 5, 6, seed=3))
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.mul_(0.5)
        for parameter in case.model[0].fused.parameters():
            parameter[:12].mul_(0.1)
    return case


def test_a_fused_weight_is_measured_in_parts() -> None:
    case = fused()
    found = layer_traces(case.model, cross_entropy(), case.batches, relative_error=0.04)
    trace, _ = truths(case, "hessian")["0.fused"]
    estimate = found["0.fused"]
    assert estimate.products > estimate.samples
    assert abs(estimate.value - trace) <= 4 * estimate.stderr
    assert estimate.relative_error <= 0.04
    undivided = _variance(case, "0.fused.weight") / (0.04 * trace) ** 2
    assert estimate.products < undivided / 10


def _variance(case: Case, name: str) -> float:
    """Return the variance of one probe an example, undivided, from the examples' dense blocks."""
    total = 0.0
    x, n = torch.cat([x for x, _ in case.batches]), len(case.targets)
    for i in range(n):
        row = slice(i, i + 1)
        one = Case(case.model, [], lambda m, r=row: m(x[r]), case.targets[row], case.names)
        place = oracles.places(case)[name]
        H = oracles.dense_hessian(one)[place, place]
        total += 2 * float(H.square().sum() - H.diagonal().square().sum()) / n**2
    return total


def test_a_map_multiplies_columns_by_its_matrix() -> None:
    convolution = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)).double()
    linear = nn.Linear(4, 5).double()
    for module, x in (
        (convolution, oracles.noise(2, 2, 6, 7, seed=1)),
        (nn.Conv1d(2, 3, 4, stride=3, padding=2).double(), oracles.noise(2, 2, 9, seed=1)),
        (linear, oracles.noise(2, 3, 2, 4, seed=1)),
        (linear, oracles.noise(2, 4, seed=1)),
    ):
        found = LinearMap("weight", module)
        y = module(x)
        rows = found.columns(x) @ found.matrix(module.weight).T + module.bias
        torch.testing.assert_close(found.output(rows, y.shape), y)
        torch.testing.assert_close(found.rows(y), rows)


def test_hooks_are_gone_and_the_model_is_as_it_was() -> None:
    case = dense(nn.Tanh())
    before = {n: p.clone() for n, p in case.model.named_parameters()}
    layer_traces(case.model, cross_entropy(), case.batches)
    assert not any(m._forward_hooks for m in case.model.modules())
    for name, parameter in case.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    maps = linear_maps(case.model, choose_layers(case.model))
    with pytest.raises(RuntimeError, match="stop"), uses_of(maps):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks for m in case.model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_frobenius_norms_are_those_of_the_dense_blocks(kind: str) -> None:
    case = dense(nn.Tanh())
    found = layer_frobenius_norms(case.model, cross_entropy(), case.batches, kind=kind)
    for layer, (_, norm) in truths(case, kind).items():
        estimate = found[layer]
        assert abs(estimate.value - norm) <= 4 * estimate.stderr
        assert estimate.relative_error <= 0.05
        assert estimate.interval is not None
        assert estimate.interval[0] < estimate.value < estimate.interval[1]
