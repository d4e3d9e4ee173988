"""The true Hessian of each layer: against dense blocks, and on models of every kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pico
import pytest
import torch
from curvature_cases import EXHAUSTING, LENGTH, measured, small_gpt2, text
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import hawqkit as hk
from hawqkit.errors import Unsupported
from hawqkit.models.batches import Sequences
from hawqkit.models.model import LoadedModel
from hawqkit.records import Sensitivities, to_array
from hawqkit.sensitivity.curvature_probe import CurvatureProbe, CurvatureSettings
from hawqkit.sensitivity.curvature_scores import (
    CURVATURE_SCORES,
    layer_traces_of,
)
from hawqkit.sensitivity.probing import ProbeSettings
from hawqkit.store import read_record, write_record


def dense_hessian(model: LoadedModel, layer: str, rows: list[int], data: Sequences) -> Tensor:
    """Return the Hessian of the mean loss over some sequences, of torch.func alone."""
    name = f"{layer}.weight"
    values = {n: p.detach() for n, p in model.module.named_parameters()}

    def mean_loss(w: Tensor) -> Tensor:
        total, count = torch.zeros((), dtype=w.dtype), 0
        for row in rows:
            length = min(LENGTH, int(data.attention[row].sum()))
            ids = data.tokens[row : row + 1, :length]
            state = {**values, name: w.view(values[name].shape)}
            out = torch.func.functional_call(model.module, state, (), {"input_ids": ids})
            p = torch.log_softmax(out.logits[0, :-1], -1)
            total = total - p.gather(1, ids[0, 1:, None]).sum()
            count += length - 1
        return total / count

    H: Tensor = torch.func.jacfwd(torch.func.grad(mean_loss))(values[name].flatten())
    return H.detach()


@pytest.fixture(scope="module")
def dense() -> dict[str, list[Tensor]]:
    """Return layer -> its Hessian in both shards of `EXHAUSTING`, then on all of their text."""
    model, data = small_gpt2(), text()
    return {
        layer.name: [
            dense_hessian(model, layer.name, rows, data) for rows in ([0, 2], [1], [0, 1, 2])
        ]
        for layer in model.layers
    }


def largest(H: Tensor) -> float:
    """Return the eigenvalue of largest magnitude, with its sign."""
    values = torch.linalg.eigvalsh(H)
    return float(values[values.abs().argmax()])


def test_exhausted_layers_have_the_dense_blocks_traces_and_top_eigenvalues(
    dense: dict[str, list[Tensor]],
) -> None:
    found = measured(EXHAUSTING)
    assert found.sequences == ((0, 2), (1,))
    data = text()
    lengths = [min(LENGTH, int(data.attention[row].sum())) - 1 for row in range(3)]
    assert found.counts == (lengths[0] + lengths[2], lengths[1])
    for shard in (0, 1):
        for column, blocks in enumerate(dense.values()):
            trace, top = float(blocks[shard].trace()), largest(blocks[shard])
            assert found.traces[shard][column] == pytest.approx(trace, rel=1e-8)
            assert found.eigenvalues[shard][column] == pytest.approx(top, rel=1e-8)
    assert not to_array(found.trace_stderr).any()
    traces, _ = layer_traces_of(found)
    assert traces == pytest.approx([float(b[2].trace()) for b in dense.values()], rel=1e-8)


def test_estimates_hold_the_dense_blocks_within_their_errors(
    dense: dict[str, list[Tensor]],
) -> None:
    asked = dataclasses.replace(EXHAUSTING, max_probes=160, max_products=160, relative_error=1e-6)
    found = measured(asked)
    traces, stderr = to_array(found.traces), to_array(found.trace_stderr)
    tops, residuals = to_array(found.eigenvalues), to_array(found.residuals)
    assert (stderr[:, 0] > 0).all()  # 768 weights, more than 160 products
    for shard in (0, 1):
        for column, blocks in enumerate(dense.values()):
            trace, top = float(blocks[shard].trace()), largest(blocks[shard])
            # a layer of 64 weights is computed exactly, to rounding
            assert abs(traces[shard, column] - trace) <= 4 * stderr[shard, column] + 1e-8
            assert residuals[shard, column] <= 1e-6 * abs(top)
            assert tops[shard, column] == pytest.approx(top, rel=1e-8)
    of_all, error = layer_traces_of(found)
    for column, blocks in enumerate(dense.values()):
        assert abs(of_all[column] - float(blocks[2].trace())) <= 4 * error[column] + 1e-8


def test_a_frozen_model_stays_frozen_and_its_weights_as_they_are() -> None:
    model, data = small_gpt2(), text()
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    probe = CurvatureProbe(model, data, model.layers, ["hessian-trace"], EXHAUSTING)
    probe.measure(probe.pieces[0])
    for name, parameter in model.module.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_withheld_sequences_change_nothing() -> None:
    model, data = small_gpt2(), text()
    tokens = data.tokens.clone()
    tokens[3:] = 8
    other = dataclasses.replace(data, tokens=tokens)
    tables = []
    for batches in (data, other):
        probe = CurvatureProbe(model, batches, model.layers, ["hessian-trace"], EXHAUSTING)
        probe.measure(probe.pieces[0])
        probe.measure(probe.pieces[1])
        tables.append(probe.finish().traces)
    assert tables[0] == tables[1]


def test_an_eigenvalue_that_is_not_found_in_its_products_is_said() -> None:
    few = dataclasses.replace(EXHAUSTING, max_products=2, relative_error=1e-6)
    model = small_gpt2()
    probe = CurvatureProbe(model, text(), model.layers, ["top-eigenvalue"], few)
    for piece in probe.pieces:
        probe.measure(piece)
    found = probe.finish()
    assert found.products == 2 * 2 * 3
    assert any("in 3 of 3 layers" in w and "after 2 products" in w for w in found.warnings)


def test_a_trace_that_ends_with_the_probes_of_a_trial_is_a_number() -> None:
    """A weight of queries, keys and values is tried in three parts; probes may end right there."""
    module = pico.gpt2(dtype=torch.float64, layers=1, hidden=8)
    model = hk.wrap_model(module, name="pico", include=["transformer.h.0.attn.c_attn"])
    settings = CurvatureSettings(1, LENGTH, 1, 1e-6, 32)
    probe = CurvatureProbe(model, text(), model.layers, ["hessian-trace"], settings)
    probe.measure(probe.pieces[0])
    found = probe.finish()
    truth = float(dense_hessian(model, model.layers[0].name, [0], text()).trace())
    assert abs(to_array(found.traces)[0, 0] - truth) <= 4 * to_array(found.trace_stderr)[0, 0]


def test_none_loses_nothing_and_the_record_comes_back(tmp_path: Path) -> None:
    model = small_gpt2()
    found = hk.probe(
        model,
        text(),
        ["int4-channel", "none"],
        also=["top-eigenvalue", "hessian-trace"],
        curvature=dataclasses.replace(EXHAUSTING, max_probes=8, max_products=8),
    )
    for name in CURVATURE_SCORES:
        assert [row[1] for row in found.scores[name].values] == [0.0] * 3
        assert [row[1] for row in found.scores[name].stderr] == [0.0] * 3
        assert all(row[0] for row in found.scores[name].values)
    write_record(tmp_path / "s.json", found)
    assert read_record(tmp_path / "s.json", Sensitivities) == found
    assert found.curvature is not None
    broken = dataclasses.replace(found.curvature, traces=found.curvature.traces[:1])
    with pytest.raises(ValueError, match=r"curvature\.traces is not a table of 2 shards x 3"):
        dataclasses.replace(found, curvature=broken)


# Piecewise linear networks.


class Linear(nn.Module):
    """A language model of one hidden ReLU layer: linear in each weight by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(pico.VOCABULARY, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, pico.VOCABULARY)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(torch.relu(self.hidden(self.embed(input_ids)))))


def test_on_a_piecewise_linear_network_the_dual_probe_gives_the_same_trace() -> None:
    module = Linear().double()
    pico.fill(module, scale=1.5)
    model = hk.wrap_model(module, name="relu")
    data = pico.sequences(24, 12, seed=3)
    found = hk.probe(
        model,
        data,
        ["int3-channel"],
        settings=ProbeSettings(batch=4),
        also=["hessian-trace"],
        curvature=CurvatureSettings(24, 12, 6, 0.02, 1000, 2),
    )
    ours, theirs = (found.scores[n] for n in ("hessian-trace", "trace"))
    for row, layer in enumerate(found.layers):
        a, b = ours.values[row][0], theirs.values[row][0]
        ea, eb = ours.stderr[row][0], theirs.stderr[row][0]
        assert a is not None
        assert b is not None
        assert abs(a - b) <= 3 * float(np.hypot(ea or 0, eb or 0)), layer.name
        assert (eb or 0) < 0.2 * b  # else the line above says little


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return g * (1 - x.tanh() ** 2)


@pytest.mark.parametrize("score", CURVATURE_SCORES)
def test_a_model_without_second_derivatives_is_refused_and_told_what_there_is(score: str) -> None:
    class Opaque(Linear):
        def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
            x = Once.apply(self.hidden(self.embed(input_ids)))  # type: ignore[no-untyped-call]
            return SimpleNamespace(logits=self.head(x))

    model = hk.wrap_model(Opaque(), name="opaque")
    probe = CurvatureProbe(model, pico.sequences(4, 8), model.layers, [score])
    with pytest.raises(Unsupported, match=f"{score} needs second derivatives: .*first derivatives"):
        probe.measure(probe.pieces[0])
