"""Signs at the outputs or drawn labels: how much does each scatter over seeds?

    python benchmarks/classifiers/draws.py [SUBJECT] [--examples 256] [--seeds 8]

The same images in every seed; printed are medians over layers of the standard deviation over seeds,
relative to the mean.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from family import calibration
from subjects import SUBJECTS

import hawqkit as hk
from hawqkit.formats import parse_format
from hawqkit.quantize.errors_of import make_errors
from hawqkit.sensitivity.dual_probe import DualProbe

FORMAT = "int3-channel"
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", nargs="?", default="resnet20", choices=["resnet20", "resnet8"])
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    subject = SUBJECTS[args.subject]()
    model = hk.wrap_model(subject.module, name=subject.name)
    shown = calibration(subject, args.examples, 0, 0)
    weights = {layer.name: model.weight(layer.name) for layer in model.layers}
    errors = {
        name: make_errors(
            weight,
            [parse_format(FORMAT)],
            rounding="nearest",
            scale_dtype=torch.float32,
            keep="codes",
        )
        for name, weight in weights.items()
    }
    print("| drawn | trace | directional, 3 bit |")
    print("|---|---|---|")
    for signs in (False, True):
        traces, forms = [], []
        for seed in range(args.seeds):
            probe = DualProbe(
                model.module, model.layers, weights, errors,
                formats=[FORMAT], positions=0, seed=seed, signs=signs,
            )  # fmt: skip
            with probe as dual:
                found = [dual.measure(part) for part in shown.micro_batches(BATCH)]
            squares = np.concatenate([part["squared_gradient"] for part in found])
            products = np.concatenate([part["directional"][..., 0] for part in found])
            traces.append(squares.mean(0))
            forms.append((products**2).mean(0))
        cells = [f"{scatter(np.array(values)):.3f}" for values in (traces, forms)]
        print(f"| {'signs' if signs else 'labels'} | {' | '.join(cells)} |", flush=True)


def scatter(values: np.ndarray) -> float:
    """Return the median over layers of std / mean over seeds, of values (seeds, L)."""
    return float(np.median(values.std(0, ddof=1) / values.mean(0)))


if __name__ == "__main__":
    main()
