"""HAWQ-V3's published allocations of ResNet-18, which are exact optima of its tables.

Figures from Zhen-Dong/HAWQ (MIT), ILP.ipynb and bit_config.py; Yao et al., "HAWQ-V3: Dyadic Neural
Network Quantization", arXiv 2011.10680. The score of a layer is average trace times weight error; a
limit is what 4 bit takes plus a share of what 8 bit takes more.
"""

from __future__ import annotations

import numpy as np
import pytest

from hawqkit.allocation import Problem, Resource, solve
from hawqkit.records import Integers, Layer

TIED = ((4, 6), (9, 11), (14, 16))
TRACE = np.array([
    0.06857826, 0.03162379, 0.03298575, 0.01205663, 0.02222431, 0.00596336, 0.06931772,
    0.00807129, 0.00372905, 0.00530698, 0.00209011, 0.00737569, 0.00210454, 0.00151197,
    0.00158041, 0.00078146, 0.00451841, 0.00098745, 0.00072944,
])  # fmt: skip
ERROR_4 = np.array([
    6.743, 3.9691, 3.3281, 2.6796, 4.7277, 10.5966, 0.6827, 9.0942, 4.8857, 10.7599,
    21.7546, 0.8603, 14.5324, 10.9651, 18.7706, 36.4044, 3.1572, 29.6994, 17.4016,
])  # fmt: skip
ERROR_8 = np.array([
    0.0235, 0.0125, 0.0102, 0.0082, 0.0145, 0.0344, 0.0023, 0.0287, 0.0148, 0.0333, 0.0682,
    0.0027, 0.0448, 0.0336, 0.0576, 0.113, 0.0102, 0.0947, 0.0532,
])  # fmt: skip
PARAMETERS = np.array([
    0.03515625, 0.03515625, 0.03515625, 0.03515625, 0.0703125, 0.140625, 0.0078125,
    0.140625, 0.140625, 0.28125, 0.5625, 0.03125, 0.5625, 0.5625, 1.125, 2.25, 0.125, 2.25,
    2.25,
])  # fmt: skip
BOPS = np.array([
    115.605504, 115.605504, 115.605504, 115.605504, 57.802752, 115.605504, 6.422528,
    115.605504, 115.605504, 57.802752, 115.605504, 6.422528, 115.605504, 115.605504,
    57.802752, 115.605504, 6.422528, 115.605504, 115.605504,
])  # fmt: skip
LATENCY_4 = np.array([
    0.21094404, 0.21092674, 0.21104113, 0.21086851, 0.13642465, 0.19167506, 0.02532183,
    0.19148203, 0.19142914, 0.11395316, 0.20556011, 0.01917474, 0.20566918, 0.20566509,
    0.13185102, 0.22287786, 0.01790088, 0.22304611, 0.22286099,
])  # fmt: skip
LATENCY_8 = np.array([
    0.36189111, 0.36211718, 0.31141909, 0.30454471, 0.19184896, 0.38948934, 0.0334169,
    0.38904905, 0.3892859, 0.19134735, 0.34307431, 0.02802354, 0.34313329, 0.34310756,
    0.21117103, 0.37376585, 0.02896843, 0.37398187, 0.37405185,
])  # fmt: skip
PUBLISHED = {
    ("modelsize", 0.75): "8888888888888488884",
    ("modelsize", 0.5): "8888888888888884844",
    ("modelsize", 0.25): "8888888888888844444",
    ("bops", 0.75): "8888888848888484884",
    ("bops", 0.5): "8884888848884444444",
    ("bops", 0.25): "8884848444444444444",
    ("latency", 0.75): "8888888848888484884",
    ("latency", 0.5): "8888848848884484844",
    ("latency", 0.25): "8884848444444444444",
}


def integer_costs() -> dict[str, Integers]:
    """(L, 2) for 4 and 8 bit: bits of the weights, bit operations, and nanoseconds on a T4."""
    entries = np.rint(PARAMETERS * 2**20)
    operations = np.rint(BOPS * 1e6)
    table = {
        "modelsize": (entries * 4, entries * 8),
        "bops": (operations, operations * 4),
        "latency": (np.rint(LATENCY_4 * 1e8), np.rint(LATENCY_8 * 1e8)),
    }
    return {name: np.stack(pair, axis=1).astype(np.int64) for name, pair in table.items()}


@pytest.mark.parametrize(("name", "share"), list(PUBLISHED))
def test_the_published_allocation_comes_out(name: str, share: float) -> None:
    second = {b for _, b in TIED}
    partner = dict(TIED)
    groups = tuple((i, partner[i]) if i in partner else (i,) for i in range(19) if i not in second)
    costs = integer_costs()[name]
    scores = np.stack([TRACE * ERROR_4, TRACE * ERROR_8], axis=1)
    least, most = int(costs[:, 0].sum()), int(costs[:, 1].sum())
    layers = tuple(Layer(f"unit{i}", "linear", 1, 64, "float32") for i in range(19))
    problem = Problem(
        layers,
        groups,
        tuple(layers[g[0]].name for g in groups),
        ("int4-g64", "int8-g64"),
        np.stack([scores[list(g)].sum(axis=0) for g in groups]),
        np.ones((len(groups), 2), dtype=np.bool_),
        (
            Resource(
                name,
                np.stack([costs[list(g)].sum(axis=0) for g in groups]),
                0,
                least + int(share * (most - least)),
                "bits",
            ),
        ),
    )
    solution = solve(problem)
    mix = problem.mix(solution.choice)
    assert "".join(mix[layer.name][3] for layer in layers) == PUBLISHED[name, share]
    assert solution.certificate.relative_gap <= 1e-12
