"""Traces at the inputs of layers against dense matrices, by torch.func alone."""

from __future__ import annotations

import curvature_oracles as oracles
import numpy as np
import pico
import pytest
import torch
from torch import nn

from hawqkit.curvature.activation_traces import activation_traces
from hawqkit.curvature.objective import Objective, cross_entropy
from hawqkit.errors import InputError, Unsupported


class Shared(nn.Module):
    """Two layers that are given the same tensor, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x, extra=None):
        """`extra`: call -> what is added to the input of that call of a layer."""
        extra = extra or {}
        a = torch.tanh(self.first(x + extra.get("first", 0)))
        left = torch.tanh(self.left(a + extra.get("left", 0)))
        right = torch.tanh(self.right(a + extra.get("right 0", 0)))
        right = torch.tanh(self.right(right + extra.get("right 1", 0)))
        return self.head(left * right + extra.get("head", 0))


CALLS = {"first": ["first"], "left": ["left"], "right": ["right 0", "right 1"], "head": ["head"]}


def dense(net, x, y, call, kind):
    """Return the trace of the dense curvature of the mean loss by what is added to one call."""
    width = 3 if call == "first" else 4
    total = 0.0
    for row, label in zip(x, y, strict=True):

        def logits(e, row=row):
            return net(row[None], {call: e[None]})[0]

        def loss(e, label=label, logits=logits):
            return nn.functional.cross_entropy(logits(e)[None], label[None])

        zero = torch.zeros(width, dtype=torch.float64)
        if kind == "hessian":
            total += float(torch.func.hessian(loss)(zero).trace())
        else:
            j = torch.func.jacrev(logits)(zero)
            p = torch.softmax(logits(zero), 0)
            total += float((j.T @ (torch.diag(p) - torch.outer(p, p)) @ j).trace())
    return total / len(x)


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_traces_at_inputs_are_those_of_dense_matrices(kind):
    net = oracles.filled(Shared(), scale=2.0).double()
    x, y = oracles.noise(7, 3, seed=1).double(), torch.arange(7) % 3
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = activation_traces(
        net, cross_entropy(), batches, kind=kind, relative_error=0.02, max_probes=2000
    )
    for name, calls in CALLS.items():
        wanted = sum(dense(net, x, y, call, kind) for call in calls)
        estimate = found[name].trace
        assert estimate.stderr > 0
        assert abs(estimate.value - wanted) < 4 * estimate.stderr
        assert found[name].entries == (3 if name == "first" else 4) * len(calls)


def test_batching_changes_no_number():
    net = oracles.filled(Shared(), scale=2.0).double()
    x, y = oracles.noise(7, 3, seed=1).double(), torch.arange(7) % 3
    together, apart = (
        activation_traces(net, cross_entropy(), b, relative_error=9, max_probes=8)
        for b in ([(x, y)], [(x[:2], y[:2]), (x[2:], y[2:])])
    )
    for name in CALLS:
        np.testing.assert_allclose(together[name].trace.value, apart[name].trace.value, rtol=1e-10)


def test_relu_nets_have_equal_hessian_and_gauss_newton_traces():
    case = oracles.cnn(relu=True)
    found = {
        kind: activation_traces(
            case.model, cross_entropy(), case.batches, kind=kind, relative_error=0.03,
            max_probes=1500,
        )
        for kind in ("hessian", "gauss-newton")
    }  # fmt: skip
    for name, hessian in found["hessian"].items():
        other = found["gauss-newton"][name].trace
        spread = np.hypot(hessian.trace.stderr, other.stderr)
        assert abs(hessian.trace.value - other.value) < 4 * spread


def test_language_models_are_measured_and_lookups_left_out():
    model = pico.gpt2(dtype=torch.float64, layers=1, hidden=8)
    model.requires_grad_(False)
    batches = list(pico.sequences(3, 7).micro_batches(2))
    found = activation_traces(model, cross_entropy(), batches, relative_error=9, max_probes=4)
    assert not any("wte" in name or "wpe" in name for name in found)
    assert all(a.trace.value > 0 for name, a in found.items() if "mlp" in name)
    assert all(not p.requires_grad for p in model.parameters())


def test_what_cannot_be_measured_is_refused():
    net = oracles.filled(Shared()).double()
    batch = [(oracles.noise(2, 3, seed=1).double(), torch.tensor([0, 1]))]
    with pytest.raises(InputError, match="at least 2"):
        activation_traces(net, cross_entropy(), batch, max_probes=1)
    plain = cross_entropy()
    rootless = Objective(outputs=plain.outputs, loss=plain.loss, name="mine")
    with pytest.raises(Unsupported, match="mine gives no root"):
        activation_traces(net, rootless, batch, kind="gauss-newton")
    net.train()
    with pytest.raises(Unsupported, match="training mode"):
        activation_traces(net, cross_entropy(), batch)
