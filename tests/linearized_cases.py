"""Small models with data, and what linear logits of them are, made in the slowest way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pico
import torch
from torch import Tensor, nn

import hawqkit as hk
from hawqkit.models import LoadedModel
from hawqkit.models.batch import Batch, Data, predictions
from hawqkit.quantize.apply import applied


def plain(items: Any, *_: Any) -> Any:
    return items


def mix_of(model: LoadedModel, *formats: str) -> dict[str, str]:
    """Return formats in turn over the layers."""
    return {x.name: formats[i % len(formats)] for i, x in enumerate(model.layers)}


def normed_cnn() -> LoadedModel:
    """Return a CNN in float64 whose batch norms have statistics, with a depthwise convolution."""
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=4), nn.BatchNorm2d(4), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    pico.fill(module, 3, scale=2.0, whole_kernels=True)
    pico.run_norms(module)
    return hk.wrap_model(module.double(), name="normed")


def pictures(count: int, size: int = 8, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return hk.make_examples(x, torch.zeros(count), classes=5, withheld=count - 2)


def texts(count: int) -> Any:
    data = pico.sequences(count, 12, ragged=True, seed=5)
    inputs = {"input_ids": data.tokens, "attention_mask": data.attention.long()}
    return hk.make_examples(inputs, torch.zeros(count), classes=3, withheld=count - 2)


def llama(attention: str = "sdpa", tied: bool = True) -> LoadedModel:
    module = pico.llama(
        dtype=torch.float64, tied=tied, attention=attention, layers=1, hidden=16, intermediate=16
    )
    return hk.wrap_model(module, name="llama")


def bert() -> LoadedModel:
    module = pico.text_classifier(attention="sdpa")
    pico.fill(module, 0, scale=3.0)  # else its answers hardly depend on the text
    return hk.wrap_model(module.double(), name="bert")


CASES = {
    "cnn": (normed_cnn, lambda: pictures(8), ("int2-channel", "int3-channel")),
    "bert": (
        bert,
        lambda: texts(6),
        ("int2-channel", "int3-channel"),
    ),
    "llama": (
        llama,
        lambda: pico.sequences(5, 7, ragged=True, withheld=3),
        ("int3-channel", "int4-channel"),
    ),
    "untied": (lambda: llama("eager", tied=False), lambda: pico.sequences(4, 6, withheld=2),
               ("int4-channel",)),
    "gpt2": (
        lambda: hk.wrap_model(pico.gpt2(dtype=torch.float64, layers=1, hidden=16), name="gpt2"),
        lambda: pico.sequences(4, 6, withheld=2),
        ("int3-channel", "int4-channel"),
    ),
}  # fmt: skip


def made(kind: str) -> tuple[LoadedModel, Data, dict[str, str]]:
    model, data, formats = CASES[kind]
    built = model()
    return built, data(), mix_of(built, *formats)


def weight_errors(model: LoadedModel, mix: Mapping[str, str], rounding: str) -> dict[str, Tensor]:
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    with applied(model, mix, rounding=rounding):
        after = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    return {n: after[n] - before[n] for n in before if not torch.equal(after[n], before[n])}


class Wrapped(nn.Module):
    """Makes the logits of a batch, one row a counted prediction."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module
        self.training = module.training

    def forward(self, batch: Batch) -> Tensor:
        return predictions(self.inner, batch, torch.device("cpu"))[batch.predicts]


def dense(
    model: LoadedModel, mix: Mapping[str, str], batch: Batch, rounding: str = "searched"
) -> tuple[Tensor, Tensor]:
    """Return z and J dW from the whole Jacobian, one parameter after the other."""
    errors = weight_errors(model, mix, rounding)
    wrapped = Wrapped(model.module)
    z = wrapped(batch)
    t = torch.zeros_like(z)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for name, error in errors.items():

            def outputs(weight: Tensor, name: str = name) -> Tensor:
                return torch.func.functional_call(wrapped, {f"inner.{name}": weight}, (batch,))

            weight = model.module.get_parameter(name).detach()
            jacobian = torch.func.jacrev(outputs)(weight)
            t += (jacobian * error).flatten(2).sum(2)
    return z, t


def parabola_by_hand(model: LoadedModel, mix: Mapping[str, str], batch: Batch, z: Tensor) -> Tensor:
    """Return how far the Lagrange polynomial through the logits at -1/4, 0, 1/4 has gone at 1."""
    errors = weight_errors(model, mix, "searched")
    weights = {n: model.module.get_parameter(n).detach() for n in errors}
    ahead, behind = (
        torch.func.functional_call(
            Wrapped(model.module),
            {f"inner.{n}": w + e * errors[n] for n, w in weights.items()},
            (batch,),
        )
        for e in (0.25, -0.25)
    )
    return 10 * ahead + 6 * behind - 15 * z - z  # x (x + e) / 2e^2, x (x - e) / 2e^2, 1 - x^2 / e^2


def exactness(kind: str) -> float:
    """Return the relative rounding of a case: Llama's norms are made in float32 whatever comes."""
    return 1e-6 if kind in ("llama", "untied") else 1e-8


def divergence(z: Tensor, other: Tensor) -> np.ndarray[Any, Any]:
    p, log = z.softmax(-1), z.log_softmax(-1) - other.log_softmax(-1)
    return (p * log).sum(-1).numpy()


def fisher_form(z: Tensor, t: Tensor) -> np.ndarray[Any, Any]:
    p = z.softmax(-1)
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return 0.5 * torch.einsum("ni,nij,nj->n", t, metric, t).numpy()


def leave_one_out(
    numerator: np.ndarray[Any, Any], denominator: np.ndarray[Any, Any]
) -> tuple[float, float]:
    """Return a ratio of sums with its jackknife error, one cluster a row."""
    count = len(numerator)
    rest = [np.delete(np.arange(count), i) for i in range(count)]
    values = np.array([numerator[r].sum() / denominator[r].sum() for r in rest])
    spread = np.sqrt((count - 1) / count * ((values - values.mean()) ** 2).sum())
    return float(numerator.sum() / denominator.sum()), float(spread)


def rounded_twice(bits: str) -> tuple[LoadedModel, Any, dict[str, str], Any]:
    """Return a smooth net whose first layer is used twice, with ranges of its inputs."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    module = Twice()
    pico.fill(module, 2, scale=2.0)
    model = hk.wrap_model(module.double(), name="twice")
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = hk.make_examples(x, torch.zeros(10), classes=4, withheld=6)
    mix = mix_of(model, bits)
    return model, data, mix, hk.calibrate_activations(model, data, model.layers, [4])


class NoForward(torch.autograd.Function):
    """x^3, without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Cube(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.first, self.second, self.own = nn.Linear(6, 5), nn.Linear(5, 4), own

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(NoForward.apply(h) if self.own else h**3)


def cubes(own: bool, dtype: torch.dtype) -> LoadedModel:
    module = Cube(own)
    pico.fill(module, 4, scale=2.0)
    return hk.wrap_model(module.to(dtype), name="cube")


def rows_of_six(dtype: torch.dtype) -> Any:
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    return hk.make_examples(x, torch.zeros(9), classes=4, withheld=8)


def state_of(model: LoadedModel) -> list[tuple[str, int, bytes]]:
    return [
        (name, value.data_ptr(), value.numpy().tobytes())
        for name, value in model.module.state_dict(keep_vars=False).items()
    ]
