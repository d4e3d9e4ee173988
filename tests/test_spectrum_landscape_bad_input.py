"""Landscapes of what makes no sense, and of losses that are not finite or not smooth."""

from __future__ import annotations

from typing import Any

import curvature_oracles as oracles
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hawqkit as hk
from hawqkit.errors import DataError, InputError, NumericalError, Unsupported


def exploding() -> tuple[nn.Module, hk.Objective]:
    """Return a loss that is infinite in float32 from w = 8.9 on."""
    net = nn.Linear(1, 1, bias=False).eval()
    with torch.no_grad():
        net.weight.fill_(0.0)
    return net, hk.Objective(lambda m, b: torch.exp(10 * m.weight), lambda z, b: (z.sum(), 1))


def test_losses_that_are_not_finite_are_none_and_counted_in_a_note() -> None:
    net, objective = exploding()
    found = hk.loss_landscape(
        net, objective, [(0,)], directions=torch.ones(1), steps=5, distance=20.0
    )
    assert [row[0] is None for row in found.losses] == [False, False, False, True, True]
    assert np.isnan(found.values[3:]).all()
    assert any("2 of 5 points" in note for note in found.notes)
    with torch.no_grad():
        net.weight.fill_(9.0)
    with pytest.raises(NumericalError, match="loss at the center is inf"):
        hk.loss_landscape(net, objective, [(0,)], directions=torch.ones(1), quadratic=False)


def test_half_precision_is_moved_and_said() -> None:
    case = oracles.mlp(dtype=torch.float32)
    wide = hk.loss_landscape(case.model, hk.cross_entropy(), case.batches, directions="random")
    half = case.model.to(torch.bfloat16)
    batches = [(x.to(torch.bfloat16), y) for x, y in case.batches]
    found = hk.loss_landscape(
        half, hk.cross_entropy(), batches, directions="random", quadratic=False
    )
    # bfloat16 has three digits, and its weights' filters another norm by as much.
    np.testing.assert_allclose(found.values, wide.values, rtol=0.05)
    assert any("rounded" in note for note in found.notes)


def test_what_cannot_be_differentiated_twice_is_measured_without_the_model() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.abs().sqrt()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return torch.full_like(gradient, torch.nan)

    net = nn.Linear(2, 1).eval()
    objective = hk.Objective(lambda m, b: Once.apply(m(b[0])), lambda z, b: ((z**2).sum(), 3))
    data = [(torch.ones(3, 2),)]
    with pytest.raises((Unsupported, NumericalError), match="quadratic=False"):
        hk.loss_landscape(net, objective, data, directions="random")
    found = hk.loss_landscape(net, objective, data, directions="random", quadratic=False, steps=3)
    assert found.curvatures is None
    assert found.axes[0].slope is None
    with pytest.raises(InputError, match="quadratic=True"):
        found.quadratic(0.0)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"directions": "tpo-1"}, "Did you mean 'top-1'"),
    "three": ({"directions": ("random",) * 3}, "3 came"),
    "none": ({"directions": ()}, "0 came"),
    "a number": ({"directions": 3}, "got int"),
    "too long": ({"directions": torch.ones(9)}, r"shape \(9,\) came; 74"),
    "parallel": ({"directions": ("top-1", "top-1")}, "parallel"),
    "zero": ({"directions": torch.zeros(74)}, "length zero"),
    "infinite": ({"directions": torch.full((74,), torch.inf)}, "NaN or infinity"),
    "unknown parameter": ({"directions": {"2.weigth": torch.ones(4, 7)}}, "Did you mean"),
    "another shape": ({"directions": {"2.weight": torch.ones(7, 4)}}, r"\(7, 4\)"),
    "rank": ({"directions": "top-75"}, "74 dimensions"),
    "biases alone": ({"directions": "random", "parameters": ["*.bias"]}, "biases=True"),
    "normalize": ({"normalize": "filters"}, "Did you mean 'filter'"),
    "one step": ({"steps": 1}, "at least 2"),
    "distance": ({"distance": 0.0}, "positive"),
    "distances": ({"distance": (1.0, 2.0, 3.0)}, "3 numbers came for 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_refused_with_the_reason(name: str) -> None:
    case = oracles.mlp()
    options, message = BAD[name]
    with pytest.raises(InputError, match=message):
        hk.loss_landscape(case.model, hk.cross_entropy(), case.batches, **options)


def test_training_mode_other_eigenvectors_and_uncounted_data_are_refused() -> None:
    case = oracles.mlp()
    other = hk.top_eigenpairs(torch.eye(5).double(), 1)
    with pytest.raises(InputError, match="none of the 4 chosen parameters"):
        hk.loss_landscape(case.model, hk.cross_entropy(), case.batches, directions=other)
    ignored = [(x, torch.full_like(y, -100)) for x, y in case.batches]
    with pytest.raises(DataError, match="no prediction counts"):
        hk.loss_landscape(
            case.model, hk.cross_entropy(), ignored, directions="random", quadratic=False
        )
    with pytest.raises(Unsupported, match="training mode"):
        hk.loss_landscape(case.model.train(), hk.cross_entropy(), case.batches)
