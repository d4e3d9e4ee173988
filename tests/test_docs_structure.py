"""The page on structure: its example runs, and what it remarks on its own holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import curvature_oracles as oracles
import numpy as np
import pytest
import torch
from curvature_oracles import Case
from torch import nn

import hawqkit as hk

PAGE = (Path(__file__).parents[1] / "docs" / "structure.md").read_text()


def test_the_example_runs_and_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/structure.md", "exec"), names)
    parts = names["parts"]
    assert int((parts.class_values > 1e-9).sum()) == 3
    assert int((parts.cross_values > 1e-9).sum()) == 3
    ranks = hk.deep_linear_ranks([25, 5, 10, 10])
    assert (ranks.gauss_newton, ranks.functional, ranks.hessian, ranks.size) == (150, 175, 250, 275)
    assert len(capsys.readouterr().out.splitlines()) >= 7


def test_every_function_of_the_table_is_public() -> None:
    table = PAGE.split("## One example")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert len(named) == 6
    assert set(named) <= set(hk.__all__)


def test_independent_features_give_g_all_the_rank_that_samples_allow() -> None:
    N, K, width = 6, 3, 8
    x, y = oracles.noise(N, 4, seed=1), oracles.noise(N, K, seed=2)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, K, bias=False)).double()
    oracles.filled(model)
    features = model[1](model[0](x)).detach()
    assert torch.linalg.matrix_rank(features) == N  # a layer wider than the samples are many
    head = Case(model, [(x, y)], lambda m: m(x), y, ("2.weight",), "squared")
    block = np.linalg.eigvalsh(oracles.dense_gauss_newton(head).detach().numpy())
    truth = np.kron(np.eye(K), (features.T @ features / N).numpy())
    np.testing.assert_allclose(block, np.linalg.eigvalsh(truth), atol=1e-14)
    assert int((block > 1e-10 * block.max()).sum()) == N * K
    whole = Case(model, [(x, y)], lambda m: m(x), y, oracles.all_names(model), "squared")
    values = np.linalg.eigvalsh(oracles.dense_gauss_newton(whole).detach().numpy())
    assert len(values) > N * K
    assert int((values > 1e-10 * values.max()).sum()) == N * K
