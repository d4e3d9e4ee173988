"""Small networks, and dense matrices of their losses by torch.func alone: nothing of hawqkit's.

A case tells its counted predictions as one function of the flat weights, written out by hand, so
that batching, padding, shifting and dividing are independent of the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pico
import torch
from torch import Tensor, nn

DOUBLE = torch.float64


@dataclass
class Case:
    """A network with its data in uneven batches, and the same data in one piece."""

    model: nn.Module
    batches: list[Any]
    predict: Callable[[nn.Module], Tensor]  # the counted predictions of all data, (N, C)
    targets: Tensor  # (N,) labels, or (N, C) numbers
    names: tuple[str, ...]
    loss: str = "cross-entropy"


def filled(model: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    pico.fill(model, seed, scale)
    return model.eval()


def mlp(*, loss: str = "cross-entropy", dtype: torch.dtype = DOUBLE, relu: bool = False) -> Case:
    activation = nn.ReLU if relu else nn.Tanh
    model = filled(nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 4))).to(dtype)
    x = noise(11, 5, seed=1).to(dtype)
    y: Tensor = torch.arange(11) % 4
    if loss != "cross-entropy":
        y = noise(11, 4, seed=2).to(dtype)
    batches = [(x[:4], y[:4]), (x[4:9], y[4:9]), (x[9:], y[9:])]
    return Case(model, batches, lambda m: m(x), y, all_names(model), loss)


def cnn(*, dtype: torch.dtype = DOUBLE, relu: bool = False) -> Case:
    """Return convolutions with batch norm, whose running statistics are not 0 and 1."""
    activation = nn.ReLU if relu else nn.Softplus
    model = filled(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            activation(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            activation(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 3),
        ),
        scale=2.0,
    )
    for norm in (model[1], model[5]):
        norm.running_mean.copy_(noise(norm.num_features, seed=3) / 4)
        norm.running_var.copy_(0.5 + noise(norm.num_features, seed=4) ** 2)
    model = model.to(dtype)
    x, y = noise(9, 2, 6, 6, seed=5).to(dtype), torch.arange(9) % 3
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    return Case(model, batches, lambda m: m(x), y, all_names(model))


def language(kind: str = "gpt2", *, attention: str = "eager", dtype: torch.dtype = DOUBLE) -> Case:
    """Return a language model with padded sequences of which some labels are ignored."""
    if kind == "gpt2":  # the embedding is tied to the head
        model: nn.Module = pico.gpt2(dtype=dtype, attention=attention, layers=1, hidden=8)
        chosen = ("transformer.wte.weight", "transformer.h.")
    else:
        model = pico.llama(
            dtype=dtype, attention=attention, layers=2, hidden=16, intermediate=12, vocabulary=24
        )
        chosen = ("model.layers.", "lm_head")
    lengths = (7, 4, 6)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, vocabulary, (3, 7), generator=generator)
    attention_mask = torch.arange(7)[None, :] < torch.tensor(lengths)[:, None]
    labels = torch.where(attention_mask, tokens, -100)
    labels[0, 3] = -100

    def batch(rows: slice) -> dict[str, Tensor]:
        return {
            "input_ids": torch.where(attention_mask, tokens, 0)[rows],
            "attention_mask": attention_mask[rows].long(),
            "labels": labels[rows],
        }

    places = [[t for t in range(n - 1) if labels[i, t + 1] != -100] for i, n in enumerate(lengths)]

    def predict(m: nn.Module) -> Tensor:
        rows = []
        for i, length in enumerate(lengths):  # one at a time and without padding
            rows.append(m(input_ids=tokens[i : i + 1, :length], use_cache=False).logits[0])
        return torch.cat([z[at] for z, at in zip(rows, places, strict=True)])

    y = torch.cat([tokens[i, torch.tensor(at) + 1] for i, at in enumerate(places)])
    names = tuple(n for n, _ in model.named_parameters() if n.startswith(chosen))
    return Case(model, [batch(slice(0, 2)), batch(slice(2, 3))], predict, y, names)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def all_names(model: nn.Module) -> tuple[str, ...]:
    return tuple(n for n, _ in model.named_parameters())


class _Calling(nn.Module):
    """Runs a function of a module, so that functional_call can put other weights in."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = model, function
        self.training = False

    def forward(self) -> Tensor:
        return self.function(self.inner)


def of_weights(case: Case) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the flat weights (n,) and the function from them to the predictions (N, C)."""
    values = [case.model.get_parameter(n).detach() for n in case.names]
    sizes = [v.numel() for v in values]
    calling = _Calling(case.model, case.predict)

    def predictions(w: Tensor) -> Tensor:
        pieces = [p.view(v.shape) for p, v in zip(w.split(sizes), values, strict=True)]
        state = {f"inner.{n}": p for n, p in zip(case.names, pieces, strict=True)}
        return torch.func.functional_call(calling, state, ())

    return torch.cat([v.flatten() for v in values]), predictions


def dense_hessian(case: Case) -> Tensor:
    w, predictions = of_weights(case)

    def mean_loss(w: Tensor) -> Tensor:
        z = predictions(w)
        if case.loss == "cross-entropy":
            return -torch.log_softmax(z, -1).gather(1, case.targets[:, None]).mean()
        return ((z - case.targets) ** 2).sum(-1).mean() / 2

    # Not jacrev of jacrev, nor jacfwd of jacrev: in torch 2.13 layer norm's weight gets another
    # second derivative where the inner one is vmapped, and the matrix is not symmetric. Checked at
    # the end.
    H = torch.func.jacfwd(torch.func.grad(mean_loss))(w)
    assert relative(H, H.T) < 1e-6
    return H.detach()


def jacobian(case: Case) -> tuple[Tensor, Tensor]:
    """Return the predictions (N, C) and their Jacobian (N, C, n)."""
    w, predictions = of_weights(case)
    return predictions(w), torch.func.jacrev(predictions, chunk_size=64)(w)


def dense_gauss_newton(case: Case) -> Tensor:
    z, J = jacobian(case)
    if case.loss != "cross-entropy":
        return torch.einsum("ncj,nck->jk", J, J) / len(z)
    p = torch.softmax(z, -1)
    mean = torch.einsum("nc,ncj->nj", p, J)
    return (torch.einsum("nc,ncj,nck->jk", p, J, J) - mean.T @ mean) / len(z)


def dense_outer(case: Case, residuals: Tensor, groups: Sequence[int] | None = None) -> Tensor:
    """Return 1/N sum of g g' with g = J' r, summed within groups of predictions first."""
    z, J = jacobian(case)
    g = torch.einsum("nc,ncj->nj", residuals, J)
    if groups is not None:
        index = torch.tensor(groups)
        g = torch.stack([g[index == i].sum(0) for i in sorted(set(groups))])
    return g.T @ g / len(z)


def true_residuals(case: Case) -> Tensor:
    z, _ = jacobian(case)
    if case.loss != "cross-entropy":
        return z - case.targets
    return torch.softmax(z, -1) - nn.functional.one_hot(case.targets, z.shape[1])


def drawn_residuals(case: Case, seed: int) -> Tensor:
    """Return p - e_y, or the noise, with one example a prediction, from the documented streams."""
    z, _ = jacobian(case)
    rows = []
    for i, row in enumerate(z.numpy()):
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, i])))
        if case.loss != "cross-entropy":
            rows.append(generator.standard_normal(len(row)))
            continue
        p = np.exp(row - row.max())
        p /= p.sum()
        y = int(np.sum(np.cumsum(p) <= generator.random(())))
        p[y] -= 1
        rows.append(p)
    return torch.tensor(np.array(rows))


def places(case: Case) -> dict[str, slice]:
    """Return where each parameter lies in the flat weights."""
    found, start = {}, 0
    for name in case.names:
        stop = start + case.model.get_parameter(name).numel()
        found[name] = slice(start, stop)
        start = stop
    return found


def relative(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
