"""Rounded inputs of layers: which score foretells them, which observer loses least.

    python benchmarks/classifiers/activations.py [SUBJECT] [--examples 512] [--held-out 1000]

1. Every layer by itself in each format: what the scores predict against the measured KL.
2. All layers with 8-bit weights and inputs of few bits: KL and accuracy of each observer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import numpy as np
import torch
from scipy.stats import spearmanr
from subjects import SUBJECTS

import hawqkit as hk
from hawqkit.models.model import LoadedModel
from hawqkit.records import to_array
from hawqkit.sensitivity.fitting import ranges_for
from hawqkit.validation.measuring import TokenResults, measure_text

FORMATS = ("w8a8", "w8a4", "w8a3", "w4a4", "w4a8")
SCORES = ("token", "directional", "trace", "weight-error")
SETTINGS = {
    "min-max": hk.ActivationSettings(observer="min-max"),
    "min-max, symmetric": hk.ActivationSettings(observer="min-max", symmetric=True),
    "mse, symmetric": hk.ActivationSettings(symmetric=True),
    "percentile 99.9": hk.ActivationSettings(observer="percentile", percentile=99.9),
    "percentile 99.99": hk.ActivationSettings(observer="percentile", percentile=99.99),
    "mse": hk.ActivationSettings(observer="mse"),
    "entropy": hk.ActivationSettings(observer="entropy"),
    "dynamic": hk.ActivationSettings(mode="dynamic"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", nargs="?", default="resnet20", choices=sorted(SUBJECTS))
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    subject = SUBJECTS[args.subject]()
    model = hk.wrap_model(subject.module, name=subject.name)
    classes = int(subject.held_out.labels.max()) + 1

    def some(arrays, count):
        part = arrays.take(slice(0, count))
        inputs = next(iter(part.inputs.values())) if len(part.inputs) == 1 else part.inputs
        return hk.make_examples(inputs, part.labels, classes=classes)

    data, held_out = some(subject.calibration, args.examples), some(subject.held_out, args.held_out)
    print(f"{subject.name}, {args.examples} examples calibrate, {args.held_out} held-out measure")
    compare_scores(model, data, held_out)
    compare_observers(model, data, held_out)


def measured(
    model: LoadedModel,
    mixes: Mapping[str, Mapping[str, str]],
    data: hk.Examples,
    ranges: hk.ActivationRanges,
) -> dict[str, TokenResults]:
    _, found = measure_text(
        model,
        mixes,
        data,
        rounding="searched",
        activations=ranges,
        batch=100,
        track=lambda items, _stage, _total: items,
    )
    return found


def compare_scores(model: LoadedModel, data: hk.Examples, held_out: hk.Examples) -> None:
    """Print each score against the measured KL of single layers."""
    found = hk.probe(model, data, FORMATS)
    names = [layer.name for layer in found.layers]
    mixes = {f"{n} {f}": {n: f} for n in names for f in FORMATS}
    assert found.activations is not None
    kl = {
        k: float(r.kl.mean())
        for k, r in measured(model, mixes, held_out, found.activations).items()
    }
    print(
        f"\none of {len(names)} layers: Spearman, median of predicted / measured, spread of its log"
    )
    print(f"| format | {' | '.join(SCORES)} |\n|---|{'---|' * len(SCORES)}")
    for column, name in enumerate(FORMATS):
        true = np.array([kl[f"{n} {name}"] for n in names])
        cells = []
        for score in SCORES:
            predicted = to_array(found.scores[score].values)[:, column]
            ratio = predicted / true
            rank = spearmanr(predicted, true).statistic
            cells.append(f"{rank:.3f}, {np.median(ratio):.2f}, {np.log(ratio).std():.2f}")
        print(f"| {name} | {' | '.join(cells)} |")
    samples = found.samples
    first = FORMATS.index("w8a4")
    worst = np.argsort(-to_array(found.scores["token"].values)[:, first])[:3]
    print("\nw8a4, the three layers of largest score: measured, token, trace")
    for row in worst:
        values = [found.scores[s].values[row][first] for s in ("token", "trace")]
        print(f"  {names[row]}: {kl[f'{names[row]} w8a4']:.4f}, {values[0]:.4f}, {values[1]:.4f}")
    joint = 0.5 * (samples.directional.sum(1) ** 2).sum(0) / samples.count.sum()
    layers = 0.5 * (samples.directional**2).sum((0, 1)) / samples.count.sum()
    everywhere = measured(
        model, {f: dict.fromkeys(names, f) for f in FORMATS}, held_out, found.activations
    )
    print("\nall layers: sum over layers, joint form, measured")
    for column, name in enumerate(FORMATS):
        true = everywhere[name].kl
        error = true.std(ddof=1) / len(true) ** 0.5
        print(
            f"  {name}: {layers[column]:.4f}, {joint[column]:.4f}, {true.mean():.4f} ± {error:.4f}"
        )


def compare_observers(model: LoadedModel, data: hk.Examples, held_out: hk.Examples) -> None:
    """Print KL and accuracy of all layers with inputs of few bits."""
    formats = ("w8a8", "w8a4", "w8a3")
    names = [layer.name for layer in model.layers]
    print(f"\nall layers: KL and accuracy\n| ranges | {' | '.join(formats)} | seconds |")
    print(f"|---|{'---|' * (len(formats) + 1)}")
    for what, settings in SETTINGS.items():
        start = time.perf_counter()
        ranges = ranges_for(model, data, formats, "refuse", settings)
        seconds = time.perf_counter() - start
        assert ranges is not None
        mixes = {f: dict.fromkeys(names, f) for f in formats}
        cells = [
            f"{r.kl.mean():.4f}, {100 * (r.top1 == r.target).mean():.1f} %"
            for r in measured(model, mixes, held_out, ranges).values()
        ]
        print(f"| {what} | {' | '.join(cells)} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
