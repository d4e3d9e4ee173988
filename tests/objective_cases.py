"""Networks with losses that are no classifier's, and their dense Gauss-Newton matrices."""

from __future__ import annotations

from typing import Any

import pico
import torch
from torch import Tensor, nn
from torch.nn import functional

import hawqkit as hk
from hawqkit.models.examples import Examples
from hawqkit.sensitivity.probing import ProbeSettings

FORMATS = ("int2-channel", "int4-channel")
NEAREST = ProbeSettings(rounding="nearest", positions=0)
DRAWS = 500


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def outputs(model: nn.Module, batch: Any) -> Tensor:
    return model(next(iter(batch.tensors.values())))


def mlp(out: int = 3) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, out)).double()
    pico.fill(net, 3)
    return net.eval()


def conv_net() -> nn.Module:
    """Return a net from pictures to pictures: many predictions of each example."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(3, 2, 3, padding=1)
    ).double()
    pico.fill(net, 4, whole_kernels=True)
    return net.eval()


def mine(name: str, loss: Any, **more: Any) -> hk.Objective:
    """Return an objective of a loss of (outputs, targets), by examples."""
    return hk.Objective(outputs, lambda z, b: (loss(z, b.labels), len(z)), name=name, **more)


def poisson(z: Tensor, y: Tensor) -> Tensor:
    return functional.poisson_nll_loss(z, y, reduction="sum")


def logistic(z: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(z, y, reduction="sum")


def huber(z: Tensor, y: Tensor) -> Tensor:
    return functional.huber_loss(z, y, reduction="sum", delta=0.5)


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with soft labels: its second derivative couples the classes."""
    return -(y.softmax(-1) * z.log_softmax(-1)).sum()


def spread(z: Tensor, y: Tensor) -> Tensor:
    """Couple all outputs of an example, those of different predictions too."""
    flat = (z - y).flatten(1)
    return ((flat**2).sum(1) + flat.sum(1) ** 2).sum() / 2


CASES = {
    "squared error": (mlp, (4,), (3,), hk.squared_error()),
    "squared error of pictures": (conv_net, (1, 4, 4), (2, 4, 4), hk.squared_error()),
    "logistic": (mlp, (4,), (3,), mine("logistic", logistic)),
    "Poisson": (mlp, (4,), (3,), mine("Poisson", poisson)),
    "Huber": (mlp, (4,), (3,), mine("Huber", huber)),
    "soft labels": (mlp, (4,), (3,), mine("soft labels", smoothed)),
    "coupled": (conv_net, (1, 4, 4), (2, 4, 4), mine("coupled", spread)),
}


def case(name: str, count: int = 3) -> tuple[nn.Module, Examples, hk.Objective]:
    build, given, wanted, objective = CASES[name]
    targets = numbers(count, *wanted, seed=2).abs() / 2
    return build(), hk.make_examples(numbers(count, *given, seed=1), targets=targets), objective


def dense(net: nn.Module, name: str, x: Tensor, y: Tensor, loss: Any, count: int) -> Tensor:
    """Return J' L_zz J / n of one weight as (rows, columns) flattened, by plain autograd."""
    values = {n: p.detach() for n, p in net.named_parameters()}
    weight = values[f"{name}.weight"]

    def out(w: Tensor) -> Tensor:
        return torch.func.functional_call(net, {**values, f"{name}.weight": w}, (x,)).flatten()

    shape = net(x).shape
    z = out(weight)
    jacobian = torch.func.jacrev(out)(weight)  # (N, *weight.shape)
    if isinstance(net.get_submodule(name), nn.ConvTranspose2d):
        jacobian = jacobian.transpose(1, 2)  # rows are output channels
    flat = jacobian.flatten(1)
    curvature = torch.autograd.functional.hessian(lambda z: loss(z.reshape(shape), y), z)
    return flat.T @ curvature @ flat / count


def loss_of(name: str) -> Any:
    plain = {"logistic": logistic, "Poisson": poisson, "Huber": huber, "soft labels": smoothed}
    plain["coupled"] = spread
    return plain.get(name, lambda z, y: ((z - y) ** 2).sum() / 2)


def repeated(data: Examples, times: int) -> Examples:
    """Return the examples again and again, each a cluster: every copy has signs of its own."""
    return hk.make_examples(
        data.inputs["(first)"].repeat(times, *[1] * (data.inputs["(first)"].ndim - 1)),
        targets=data.labels.repeat(times, *[1] * (data.labels.ndim - 1)),
    )
