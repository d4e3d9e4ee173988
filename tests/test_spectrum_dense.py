"""The record of a spectrum against dense matrices in float64, where the dimension allows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from torch import Tensor, nn

from hawqkit.curvature.products.autograd import gradient_graph
from hawqkit.errors import InputError, StateMismatch
from hawqkit.estimators.effective_ranks import power_law
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.records import WHOLE_NETWORK, Spectrum
from hawqkit.spectrum.blocks import BlockSettings, affordable_pairs
from hawqkit.spectrum.measuring import SpectrumSettings, measure_spectrum, resolve_layers
from hawqkit.spectrum.per_layer import layer_densities, layer_ranks, layer_top_eigenpairs
from hawqkit.store import read_record, write_record

EACH = BlockSettings(top=3, steps=16, draws=4)
EPS = (1e-2, 1e-4, 1e-6)
LAYER = "transformer.h.0.attn.c_proj"


def model() -> LoadedModel:
    # GPT-2: unlike Llama's, its norms and softmax stay in float64.
    net = pico.gpt2(dtype=torch.float64, hidden=8, layers=1)
    return wrap_model(net, name="pico", exclude=["transformer.wte", "lm_head"])


def measured(settings: SpectrumSettings, **options: object) -> Spectrum:
    found = measure_spectrum(model(), pico.sequences(3, 10), settings, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def mean_loss(net: nn.Module, tokens: Tensor) -> Tensor:
    logits = net(input_ids=tokens).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].flatten()
    )


def dense_gauss_newton(net: nn.Module, parameter: nn.Parameter, tokens: Tensor) -> Tensor:
    """Return J' (diag p - p p') J / n, row by row: another way than any operator's."""
    parameter.requires_grad_(True)
    z = net(input_ids=tokens).logits[:, :-1].reshape(-1, pico.VOCABULARY)
    J = torch.stack(
        [torch.autograd.grad(x, parameter, retain_graph=True)[0].flatten() for x in z.flatten()]
    ).view(*z.shape, -1)
    p = z.softmax(-1).detach()
    pJ = torch.einsum("ic,icn->in", p, J)
    return (torch.einsum("ic,icn,icm->nm", p, J, J) - pJ.T @ pJ) / len(z)


def dense_hessian(net: nn.Module, parameter: nn.Parameter, tokens: Tensor) -> Tensor:
    parameter.requires_grad_(True)
    (g,) = torch.autograd.grad(mean_loss(net, tokens), parameter, create_graph=True)
    rows = [torch.autograd.grad(x, parameter, retain_graph=True)[0].flatten() for x in g.flatten()]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["gauss-newton", "hessian"])
def test_a_layers_record_is_that_of_its_dense_matrix(kind: str) -> None:
    found = measured(SpectrumSettings(kind, (LAYER,), whole=False, eps=EPS, each=EACH))
    (block,) = found.blocks
    net = model()
    dense = dense_hessian if kind == "hessian" else dense_gauss_newton
    A = dense(net.module, net.parameter(LAYER), pico.sequences(3, 10).tokens).numpy()
    truth = np.linalg.eigvalsh((A + A.T) / 2)
    order = truth[np.argsort(-np.abs(truth))]
    assert (block.name, block.size, block.block, block.method) == (LAYER, 64, 0, "dense")
    assert block.top is not None
    np.testing.assert_allclose(block.top.values, order[:3], rtol=1e-9)
    assert block.largest == pytest.approx(order[0], rel=1e-6)
    assert all(r < 1e-12 * abs(order[0]) * 64 for r in block.top.residuals)
    for eps, count, share in zip(EPS, block.ranks.counts, block.ranks.degeneracy, strict=True):
        assert block.ranks.noise_floor < 1e-12
        assert count.value == (np.abs(truth) >= eps).sum()
        assert count.stderr == 0
        assert share.value == pytest.approx(1 - count.value / 64)
    assert block.smallest == pytest.approx(truth.min(), abs=1e-12)
    assert block.ranks.negative[0].value == (truth <= -1e-2).sum()
    s = block.statistics
    assert s is not None
    square = (truth**2).sum()
    assert s.trace.value == pytest.approx(truth.sum(), rel=1e-9)
    assert s.stable.value == pytest.approx(square / order[0] ** 2, rel=1e-9)
    assert s.trace_ratio.value == pytest.approx(truth.sum() / abs(order[0]), rel=1e-9)
    assert s.participation.value == pytest.approx(truth.sum() ** 2 / square, rel=1e-9)


def test_the_hessian_of_a_layer_has_negative_eigenvalues_and_gauss_newton_has_none() -> None:
    def smallest(kind: str) -> float:
        return measured(SpectrumSettings(kind, (LAYER,), False, EPS, EACH)).blocks[0].smallest

    assert smallest("hessian") < -1e-3
    assert abs(smallest("gauss-newton")) < 1e-12


def test_the_whole_networks_intervals_hold_its_dense_spectrum() -> None:
    from hawqkit.curvature.gauss_newton import gauss_newton
    from hawqkit.curvature.objective import cross_entropy
    from hawqkit.estimators.ranks import DENSE_UP_TO

    net = model()
    found = measured(SpectrumSettings(layers=(), eps=EPS, each=BlockSettings(5, 24, 4)))
    whole = found.whole
    assert whole is not None
    assert whole.size > DENSE_UP_TO
    assert whole.method == "lanczos quadrature"
    G = gauss_newton(net, cross_entropy(), pico.sequences(3, 10)).dense()
    truth = torch.linalg.eigvalsh((G + G.T) / 2).numpy()[::-1]
    assert whole.top is not None
    np.testing.assert_allclose(whole.top.values, truth[:5], rtol=1e-6)
    for eps, count in zip(EPS, whole.ranks.counts, strict=True):
        assert count.covers(float((truth >= eps).sum()))
    assert whole.statistics is not None
    assert abs(whole.statistics.trace.value - truth.sum()) < 5 * whole.statistics.trace.stderr


@pytest.mark.parametrize("whole", [True, False])
def test_all_hessians_of_a_single_batch_differentiate_one_graph(
    monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    made = []

    def counted(*arguments: object) -> object:
        made.append(arguments)
        return gradient_graph(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("hawqkit.curvature.products.autograd.gradient_graph", counted)
    each = BlockSettings(top=1, steps=3, draws=2)
    names = ("transformer.h.0.attn.*", "transformer.h.0.mlp.*")
    found = measured(SpectrumSettings("hessian", names, whole, eps=EPS, each=each))
    assert len(found.everything) == 4 + whole
    assert len(made) == 1


def test_top_n_takes_the_layers_of_largest_trace_in_the_models_order() -> None:
    each = BlockSettings(top=1, steps=4, draws=2)
    every = measured(SpectrumSettings(layers="all", whole=False, eps=EPS, each=each))
    best = measured(SpectrumSettings(layers="top-2", whole=False, eps=EPS, each=each))
    traces = {b.name: b.statistics.trace.value for b in every.blocks if b.statistics is not None}
    expected = sorted(traces, key=lambda name: -traces[name])[:2]
    assert [b.name for b in best.blocks] == [name for name in traces if name in expected]
    assert set(best.traces) == set(traces)
    assert not every.traces


def test_an_eps_below_the_noise_floor_is_lifted_and_the_record_says_why() -> None:
    found = measured(SpectrumSettings(layers=(LAYER,), whole=False, eps=(1e-2, 1e-30), each=EACH))
    (block,) = found.blocks
    assert block.ranks.asked == (1e-2, 1e-30)
    assert block.ranks.eps == (1e-2, block.ranks.noise_floor)
    assert any("1e-30 was lifted" in note and "noise floor" in note for note in block.notes)
    assert any("noise" in warning for warning in found.warnings)


def test_a_rank_that_no_node_resolves_is_told_by_its_bounds() -> None:
    each = BlockSettings(top=2, steps=3, draws=3)
    whole = measured(SpectrumSettings(layers=(), eps=(1e-9,), each=each)).whole
    assert whole is not None
    assert not whole.resolves(0)
    low, high = whole.ranks.counts[0].interval or (0.0, 0.0)
    assert low < 27 * 95 < whole.size == high  # 27 predictions among 96 tokens bound the rank
    count = whole.ranks.counts[0]
    assert count.value == (low + high) / 2  # never n ± 0, though every draw says n
    assert abs(1.96 * count.stderr - (high - low) / 2) < 0.001 * (high - low)
    share = whole.ranks.degeneracy[0]
    assert share.value == pytest.approx(1 - count.value / whole.size)
    assert share.stderr == pytest.approx(count.stderr / whole.size)


def test_the_power_law_is_that_of_the_largest_known_eigenvalues() -> None:
    each = BlockSettings(top=12, steps=16, draws=3)
    found = measured(SpectrumSettings(layers=(), eps=EPS, each=each)).whole
    assert found is not None
    assert found.top is not None
    assert found.power_law is not None
    assert found.power_law == power_law(found.top.values)
    few = measured(SpectrumSettings(layers=(), eps=EPS, each=EACH)).whole
    assert few is not None
    assert few.power_law is None  # three eigenvalues say nothing


def test_one_draw_gives_no_error_bar_and_no_effective_ranks() -> None:
    whole = measured(SpectrumSettings(layers=(), eps=EPS, each=BlockSettings(2, 8, 1))).whole
    assert whole is not None
    assert whole.statistics is None
    assert any("one draw" in note for note in whole.notes)
    assert whole.ranks.counts[0].interval is not None


def test_the_record_survives_its_file(tmp_path: Path) -> None:
    found = measured(SpectrumSettings(layers="top-1", eps=EPS, each=EACH))
    write_record(tmp_path / "spectrum.json", found)
    assert read_record(tmp_path / "spectrum.json", Spectrum) == found
    assert set(found.densities) == {WHOLE_NETWORK, *(b.name for b in found.blocks)}


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    settings = SpectrumSettings(layers=(LAYER,), whole=False, eps=EPS, each=EACH)
    measured(settings, folder=tmp_path)
    other = SpectrumSettings(layers=(LAYER,), whole=False, eps=EPS, each=BlockSettings(3, 17, 4))
    with pytest.raises(StateMismatch, match="steps: there 16, now 17"):
        measured(other, folder=tmp_path)


def test_other_thresholds_count_again_without_a_product(tmp_path: Path) -> None:
    layers = (LAYER,)
    one = measured(SpectrumSettings(layers=layers, whole=False, eps=EPS, each=EACH))
    measured(SpectrumSettings(layers=layers, whole=False, eps=(0.5,), each=EACH), folder=tmp_path)
    (folder,) = tmp_path.glob("layer-*")
    folder.rename(tmp_path / "gone")  # measuring again would make it again
    again = measured(
        SpectrumSettings(layers=layers, whole=False, eps=EPS, each=EACH), folder=tmp_path
    )
    assert again == one
    assert not folder.exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (SpectrumSettings(kind="fisher"), "kind: got 'fisher'"),
        (SpectrumSettings(layers="top-99"), "more than the"),
        (SpectrumSettings(layers="best"), "'all', 'top-N'"),
        (SpectrumSettings(layers=("nothing.*",)), "matches none"),
        (SpectrumSettings(layers=(), whole=False), "nothing is to be measured"),
        (SpectrumSettings(eps=()), "eps: thresholds"),
        (SpectrumSettings(eps=(0.0,)), "eps: thresholds"),
        (SpectrumSettings(each=BlockSettings(draws=0)), "draws: must be 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: SpectrumSettings, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("*", r"\*")):
        measured(settings)


def test_patterns_and_all_resolve_to_layers() -> None:
    net = model()
    every, count = resolve_layers(net, "all")
    assert count is None
    assert LAYER in every
    assert resolve_layers(net, ["*.c_proj"])[0] == tuple(n for n in every if "c_proj" in n)
    assert resolve_layers(net, "top-2") == (every, 2)


def test_pairs_that_do_not_fit_into_memory_are_fewer() -> None:
    assert affordable_pairs(100, 10, 8) == 10
    assert affordable_pairs(3, 10, 8) == 3
    assert affordable_pairs(135_000_000, 10, 4) == 4
    assert affordable_pairs(10**10, 10, 4) == 0


def test_a_plain_network_with_pairs_has_its_layers_spectra() -> None:
    from hawqkit.curvature.objective import squared_error

    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    pico.fill(net)
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
    batches = [(x, torch.zeros(5, 2, dtype=torch.float64))]
    found = measure_spectrum(
        net, batches, SpectrumSettings(layers="all", eps=EPS, each=EACH), objective=squared_error()
    )
    assert found is not None
    assert [b.name for b in found.blocks] == ["0", "2"]
    assert found.data is None
    ranks = layer_ranks(net, squared_error(), batches, list(EPS), kind="gauss-newton")
    pairs = layer_top_eigenpairs(net, squared_error(), batches, 3, kind="gauss-newton")
    densities = layer_densities(net, squared_error(), batches, kind="gauss-newton")
    for block in found.blocks:
        assert block.ranks.counts == ranks[block.name].counts
        assert block.top is not None
        off = np.abs(pairs[block.name].values - block.top.values)
        assert (off <= pairs[block.name].residuals).all()
        assert densities[block.name].size == block.size


def test_a_long_measurement_tells_how_many_products_it_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hawqkit.spectrum.watching.EVERY", 0.0)
    caplog.set_level("INFO", logger="hawqkit")
    whole = measured(SpectrumSettings(layers=(), eps=EPS, each=BlockSettings(0, 4, 2))).whole
    assert whole is not None
    assert f"spectrum of whole network: {whole.products} products in" in caplog.messages[-1]
