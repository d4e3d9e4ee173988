"""Signs at the outputs have the moments of drawn labels' gradients."""

from __future__ import annotations

import numpy as np
import torch

from hawqkit.sensitivity.output_signs import sign_residuals


def test_mean_and_covariance_are_those_of_drawn_labels():
    """Exactly, over all sign vectors: mean 0, covariance diag p - p p'."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1, 4, generator=generator, dtype=torch.float64)
    p = torch.softmax(z[0, 0], 0)
    counted = torch.ones(1, 1, dtype=torch.bool)
    found = {
        tuple(np.round(sign_residuals(z, counted, [i], 3)[0, 0].numpy(), 12)) for i in range(400)
    }
    assert len(found) == 16  # every sign vector came at least once
    rows = np.array(sorted(found))
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-12)
    wanted = torch.diag(p) - torch.outer(p, p)
    np.testing.assert_allclose(rows.T @ rows / 16, wanted, atol=1e-12)


def test_signs_depend_on_seed_and_example_alone_and_vanish_where_nothing_counts():
    z = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    counted = torch.tensor([[True, True, False], [True, True, True]])
    both = sign_residuals(z, counted, [7, 9], 1)
    alone = sign_residuals(z[1:], counted[1:], [9], 1)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=0)
    assert not both[0, 2].any()
    assert not torch.equal(both, sign_residuals(z, counted, [7, 9], 2))
