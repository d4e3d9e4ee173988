"""The jackknife against leaving each cluster out by hand."""

from __future__ import annotations

import numpy as np

from hawqkit.statistics import bootstrap_weights, cluster_sums, jackknife, ratio


def test_ratio_equals_leaving_each_document_out_by_hand() -> None:
    generator = np.random.default_rng(0)
    top, bottom = generator.random((9, 2)), generator.integers(3, 9, 9).astype(float)
    document = np.array([0, 0, 1, 2, 2, 2, 5, 6, 6])
    value, stderr = ratio(top, bottom, document)
    np.testing.assert_allclose(value, top.sum(0) / bottom.sum())
    left = np.array([
        top[document != d].sum(0) / bottom[document != d].sum() for d in np.unique(document)
    ])  # fmt: skip
    c = len(left)
    np.testing.assert_allclose(stderr, np.sqrt((c - 1) / c * ((left - left.mean(0)) ** 2).sum(0)))


def test_the_error_of_a_mean_is_the_usual_one() -> None:
    values = np.random.default_rng(1).normal(size=40)
    _, stderr = ratio(values, np.ones(40), np.arange(40))
    np.testing.assert_allclose(stderr, values.std(ddof=1) / 40**0.5)


def test_one_cluster_has_no_error() -> None:
    _, stderr = jackknife(lambda s: s["a"], {"a": np.ones((1, 3))})
    assert np.isinf(stderr).all()


def test_bootstrap_weights_move_whole_documents() -> None:
    document = np.array([4, 4, 7, 9])
    for seed in range(20):
        w = bootstrap_weights(document, np.random.default_rng(seed))
        assert w[0] == w[1]
        assert w[0] + w[2] + w[3] == 3
        np.testing.assert_array_equal(cluster_sums(w, document)[0], 2 * w[0])
