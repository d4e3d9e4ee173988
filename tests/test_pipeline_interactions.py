"""Interactions between layers in the choice: on by default for classifiers, and said."""

from __future__ import annotations

import numpy as np
import pico
import pytest
import torch
from torch import nn

import hawqkit as hk
from hawqkit.allocation import make_problem
from hawqkit.errors import InputError
from hawqkit.pipeline.interacting import solved
from hawqkit.sensitivity.layer_interactions import SHARE

FORMATS = ["int2-channel", "int3-channel", "int4-channel", "int8-channel"]


@pytest.fixture(scope="module")
def table():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    pico.fill(net, 3, 2.0)
    x = torch.randn(96, 1, 9, 9, generator=generator)
    model = hk.wrap_model(net, name="net")
    examples = hk.make_examples(x, torch.arange(96) % 4, withheld=32)
    return hk.probe(model, examples, FORMATS)


def objective(table, mix, share):
    """Return the summed score and interactions of a mix, pair by pair."""
    s = table.samples
    rows = np.flatnonzero(s.withheld == 0)
    columns = [table.formats.index(mix[layer.name]) for layer in table.layers]
    score = sum(table.scores[table.auto].values[i][column] for i, column in enumerate(columns))
    p = [s.directional[rows][:, i, column] for i, column in enumerate(columns)]
    both = sum(float(p[i] @ p[j]) for i in range(len(p)) for j in range(len(p)) if i != j)
    return score + share * 0.5 * both / s.count[rows].sum()


def test_classifiers_are_chosen_for_with_interactions(table):
    chosen = hk.allocate(table, average_bits=3.5, draws=4)
    plain = hk.allocate(table, average_bits=3.5, draws=0, interactions=False)
    assert (chosen.interactions, plain.interactions) == (SHARE, 0.0)
    assert plain.certificate.status == "optimal"
    proof = chosen.certificate
    assert proof.objective == chosen.objective
    assert proof.bound <= proof.objective <= 1.1 * plain.objective * (1 + 1e-12)
    together, apart = (objective(table, a.layers, SHARE) for a in (chosen, plain))
    assert together <= apart * (1 + 1e-9)
    assert chosen.totals.average_bits <= 3.5
    assert chosen.objective >= plain.objective * (1 - 1e-12)  # the sum alone cannot be smaller
    assert set(chosen.stability) == set(chosen.layers)
    assert chosen.prediction.cross_fitted is not None


def test_a_score_that_is_named_chooses_as_it_was_published(table):
    assert hk.allocate(table, average_bits=3.5, draws=0, score="trace").interactions == 0.0
    asked = hk.allocate(table, average_bits=3.5, draws=0, score="trace", interactions=True)
    assert asked.interactions == SHARE


def test_a_limit_on_the_kl_goes_without_and_says_so_when_asked(table):
    limit = 2 * max(v for row in table.scores["token"].values for v in row)
    assert hk.allocate(table, max_predicted_kl=limit, draws=0).interactions == 0.0
    with pytest.raises(InputError, match="sums over layers"):
        hk.allocate(table, max_predicted_kl=limit, draws=0, interactions=True)


def test_too_many_pairs_go_without_and_say_so_when_asked(table, monkeypatch):
    monkeypatch.setattr("hawqkit.pipeline.interacting.MOST_CELLS", 15)
    assert hk.allocate(table, average_bits=3.5, draws=0).interactions == 0.0
    with pytest.raises(InputError, match="4 layers in 4 formats are 16 pairs"):
        hk.allocate(table, average_bits=3.5, draws=0, interactions=True)


def test_language_models_are_chosen_for_by_the_sum_unless_asked():
    model = hk.wrap_model(pico.llama(), name="pico", exclude=["lm_head"])
    found = hk.probe(model, pico.sequences(6, 16, withheld=2), ["int2-g32", "int4-g32"])
    assert hk.allocate(found, average_bits=3.0, draws=0).interactions == 0.0
    asked = hk.allocate(found, average_bits=3.0, draws=0, interactions=True)
    assert asked.interactions == SHARE


def test_layers_of_a_group_add_what_they_do_to_each_other(table):
    names = [layer.name for layer in table.layers]
    problem = make_problem(
        table.layers,
        FORMATS,
        np.array(table.scores["token"].values),
        budgets={"average_bits": 3.5},
        groups={names[1]: "pair", names[2]: "pair"},
    )
    found = solved(problem, table.samples, SHARE)
    mix = problem.mix(found.choice)
    assert mix[names[1]] == mix[names[2]]
    np.testing.assert_allclose(found.objective, objective(table, mix, SHARE), rtol=1e-9)
