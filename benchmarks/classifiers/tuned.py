"""ResNet-20 with 4-bit inputs: mixes at the bit operations of uniform w4a4 and w3a4, then tuned.

    python benchmarks/classifiers/tuned.py [--seeds 0 1 2] [--widths 4 3] [--epochs 3]
    python benchmarks/classifiers/tuned.py --seeds 0 --widths 3 --epochs 1 --examples 10000

The budget is the bit operations of every layer in the uniform format; the formats are 2 to 8 bits
for weights beside inputs of 4 bits. Tuning trains on the training images with the original as a
teacher. Kept in --out: started again, it goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from data import cache
from family import calibration, examples
from subjects import resnet20

import hawqkit as hk
from hawqkit.tuning.settings import Distillation, TuneSettings

INPUT_BITS = 4
WEIGHT_BITS = (2, 3, 4, 5, 6, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--examples", type=int, default=60_000, help="that train")
    parser.add_argument("--scales", default="both", choices=["none", "weights", "inputs", "both"])
    parser.add_argument("--start", default="rounded", choices=["rounded", "lsq"])
    parser.add_argument("--norms", default="re-estimated", choices=["frozen", "re-estimated"])
    parser.add_argument("--out", type=Path, default=None, help="folder, default within the cache")
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = ["seed", "at the BOPs of", "average weight bits", "original %", "mix %", "uniform %"]
    print("| " + " | ".join([*head, "tuned mix %"]) + " |")
    print("|---|---|---|---|---|---|---|")
    lost: dict[int, list[float]] = {}
    for seed in args.seeds:
        for width in args.widths:
            before, after = one(seed, width, args)
            lost.setdefault(width, []).append(100 * (before - after))
    for width, points in lost.items():
        print(
            f"w{width}a{INPUT_BITS}: {np.mean(points):+.2f} points lost after tuning, "
            f"{len(points)} seeds, the most {max(points):+.2f}"
        )


def one(seed: int, width: int, args: argparse.Namespace) -> tuple[float, float]:
    """Return the accuracy of the original and of the tuned mix."""
    folder: Path = args.out or cache() / "tuned"
    subject = resnet20(seed)
    model = hk.wrap_model(subject.module, name=subject.name)
    shown = calibration(subject, 1024, 512, seed)
    model = hk.with_operations(model, shown)
    formats = [f"w{bits}a{INPUT_BITS}" for bits in WEIGHT_BITS]
    table = hk.probe(model, shown, formats, folder=folder / f"probe-{subject.name}")
    limit = sum(layer.macs * width * INPUT_BITS for layer in table.layers)
    chosen = hk.allocate(table, bops=limit, draws=0, baselines=("uniform",))
    held_out = examples(subject, subject.held_out, "held out")
    part = subject.calibration.take(slice(0, args.examples))
    training = examples(subject, part, "training part")
    how = f"{args.examples}-{args.epochs:g}-{args.scales}-{args.start}-{args.norms}"
    tuned = hk.tune(
        model,
        chosen,
        training,
        settings=TuneSettings(
            epochs=args.epochs,
            batch=128,
            optimizer="sgd",
            learning_rate=0.02,
            schedule="one-cycle",
            weight_decay=1e-4,
            learned_scales=args.scales,
            start=args.start,
            distillation=Distillation(alpha=0.7, temperature=2.0),
            batch_norm=args.norms,
            seed=seed,
        ),
        folder=folder / f"{subject.name}-w{width}-{how}",
    )
    found = hk.validate(model, chosen, held_out, tuned=tuned).classification["held-out"]
    original = found.original.accuracy
    mix, uniform, reached = (found.mixes[n].accuracy for n in ("chosen", "uniform", "tuned"))
    shown_bits = chosen.totals.average_bits
    print(
        f"| {seed} | w{width}a{INPUT_BITS} | {shown_bits:.2f} | {100 * original:.2f} | "
        f"{100 * mix:.2f} | {100 * uniform:.2f} | {100 * reached:.2f} |",
        flush=True,
    )
    return original, reached


if __name__ == "__main__":
    main()
