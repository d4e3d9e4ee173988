"""The HAWQ family on a classifier: who chooses best at equal size, and how well is it predicted?

    python benchmarks/classifiers/family.py resnet20 --bits 3.0 2.5 2.2 --seeds 0 1 2

Weights only, one scale a channel, 2 to 8 bits; every way to choose sees the same examples,
is solved by the same exact solver within the same average bits, is rounded in the same way, and is
measured on the same held-out examples. A seed draws the calibration examples and, where a subject
is trained from one, the network.

    ours          what `hk.allocate` does by default: the score that `auto` stands for, with half of
                  what layers do together
    sum           the same score without interactions
    uniform       one width; where the budget lies between two widths, layers in the model's order
                  take the wider one so that its share is the same all the way (`spread`)
    ends          8 bits in the first and the last layer, `uniform` between them, at the same size
    weight-error  |dW|^2 alone
    hawq-v1       the largest eigenvalue of a layer's Hessian times |dW|^2
    hawq-v2       the average trace of the true Hessian times |dW|^2; `trace` is the same with the
                  Gauss-Newton matrix, from the probe

Each mix is also predicted on the examples that choose nothing, by an exact softmax of logits that
are linear in the errors of all layers, or lie on a parabola through those at a quarter of the
errors, and measured on those same examples; ratios to that are paired. `joint / measured` compares
the withheld examples with the held-out ones.

MiniLM has 500 examples to calibrate on: give it `--examples 400 --withheld 100`.

Differences are paired by example. Logits are kept in --out: started again, it goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import Arrays, cache
from measuring import BATCH, Outcome, mean_and_error, outcome, stacked
from subjects import SUBJECTS, Subject, efficientnet_lite0

import hawqkit as hk
from hawqkit.allocation import allocate_table, interactions
from hawqkit.formats import parse_format
from hawqkit.models import Examples
from hawqkit.records import Layer, Linearized, Prediction, Sensitivities, to_array
from hawqkit.sensitivity.curvature_probe import CurvatureSettings
from hawqkit.sensitivity.prediction import predict
from hawqkit.sensitivity.probing import ProbeSettings, untracked
from hawqkit.validation.linearized import linearized_kl

FORMATS = ["int2-channel", "int3-channel", "int4-channel", "int5-channel", "int6-channel"]
FORMATS += ["int8-channel"]
HESSIAN = {"hawq-v1": "top-eigenvalue", "hawq-v2": "hessian-trace"}
OURS = "ours"
Mix = dict[str, str]


@dataclass(frozen=True, slots=True)
class Result:
    """One way to choose, at one size and seed."""

    mix: Mix
    bits: float
    predicted: Prediction
    linear: Linearized
    found: Outcome


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    interactions.MOST_SUM = args.most_sum  # a constant of the library, which this may move
    results: dict[float, dict[str, list[Result]]] = {bits: {} for bits in args.bits}
    for seed in args.seeds:
        for bits, found in one_seed(args, seed).items():
            for name, result in found.items():
                results[bits].setdefault(name, []).append(result)
    for bits, of_seeds in results.items():
        print(f"\n### {args.subject}, {bits:g} bits on average\n\n{table_of(of_seeds)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=sorted(SUBJECTS))
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0], help="average bits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, default=1024, help="that choose")
    parser.add_argument("--withheld", type=int, default=512, help="that predict alone")
    parser.add_argument("--held-out", type=int, help="examples to measure on, default all")
    parser.add_argument(
        "--on-training", type=int, metavar="N",
        help="measure on N images of the training part that neither choose nor predict, instead",
    )  # fmt: skip
    parser.add_argument(
        "--most-sum", type=float, default=interactions.MOST_SUM,
        help="how far above its least the sum may go for interactions",
    )  # fmt: skip
    parser.add_argument("--exclude", nargs="*", default=[], help="modules to leave as they are")
    parser.add_argument("--score", nargs="*", default=[], help="further scores to choose by")
    parser.add_argument("--rounding", default="searched", choices=["searched", "nearest"])
    parser.add_argument("--without-hessian", action="store_true", help="leave out hawq-v1 and -v2")
    parser.add_argument("--hessian-examples", type=int, default=64, help="of those that choose")
    parser.add_argument("--out", type=Path, default=None, help="folder, default within the cache")
    return parser.parse_args()


def one_seed(args: argparse.Namespace, seed: int) -> dict[float, dict[str, Result]]:
    """Return average bits -> way to choose -> result."""
    make = SUBJECTS[args.subject]
    subject = make() if make is efficientnet_lite0 else make(seed)
    folder = args.out or cache() / "family"
    model = hk.wrap_model(subject.module, name=subject.name, exclude=args.exclude)
    shown = calibration(subject, args.examples, args.withheld, seed)
    start = time.perf_counter()
    table = hk.probe(
        model,
        shown,
        FORMATS,
        settings=ProbeSettings(rounding=args.rounding, seed=seed),
        also=[] if args.without_hessian else list(HESSIAN.values()),
        curvature=CurvatureSettings(
            sequences=args.hessian_examples, shards=4, max_probes=16, relative_error=0.05
        ),
        folder=folder / f"probe-{subject.name}-{seed}",
    )
    print(f"{subject.name}, draw {seed}: probed in {time.perf_counter() - start:.0f} s", flush=True)
    held_out = measured_on(args, subject, seed)
    found: dict[float, dict[str, Result]] = {}
    for bits in args.bits:
        mixes = choose(table, bits, args.score)
        found[bits] = {}
        for name, mix in mixes.items():
            done = outcome(model, mix, held_out, rounding=args.rounding, folder=folder)
            assert table.samples is not None
            told = predict(table.samples, table.layers, FORMATS, mix)
            linear = linearized_kl(
                model, mix, shown, rounding=args.rounding, batch=BATCH, track=untracked
            )
            found[bits][name] = Result(mix, bits_of(table.layers, mix), told, linear, done)
            print(f"{subject.name} {bits:g} {name}: KL {done.kl.mean():.4f}", flush=True)
    return found


def measured_on(args: argparse.Namespace, subject: Subject, seed: int) -> Examples:
    if args.on_training is None:
        return examples(subject, subject.held_out.take(slice(0, args.held_out)), "held out")
    used = args.examples + args.withheld
    rows = drawn(subject, seed)[used : used + args.on_training]
    return examples(subject, subject.calibration.take(rows), "rest of the training part")


def drawn(subject: Subject, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(subject.calibration), generator=generator)


def calibration(subject: Subject, choosing: int, withheld: int, seed: int) -> Examples:
    """Draw examples to calibrate on; the last of them only predict."""
    order = drawn(subject, seed)[: choosing + withheld]
    if len(order) < choosing + withheld:
        raise SystemExit(
            f"{subject.name} has {len(subject.calibration)} examples to calibrate on; "
            f"{choosing} to choose and {withheld} to predict are too many."
        )
    return examples(subject, subject.calibration.take(order), "calibration", withheld)


def examples(subject: Subject, arrays: Arrays, part: str, withheld: int = 0) -> Examples:
    return hk.make_examples(
        arrays.inputs.get("x", arrays.inputs),
        arrays.labels,
        classes=int(subject.held_out.labels.max()) + 1,
        withheld=withheld,
        source=f"{subject.name}, {part}",
    )


def choose(table: Sensitivities, bits: float, further: Sequence[str]) -> dict[str, Mix]:
    """Return way to choose -> mix, all within the same average bits."""
    layers = table.layers
    scores = {"sum": table.auto, "weight-error": "weight-error", "trace": "trace"}
    scores |= {name: score for name, score in HESSIAN.items() if score in table.scores}
    scores |= {name: name for name in further}
    mixes = {OURS: hk.allocate(table, average_bits=bits, draws=0, baselines=()).layers}
    for name, score in scores.items():
        values = to_array(table.scores[score].values)
        mixes[name] = allocate_table(layers, FORMATS, values, budgets={"average_bits": bits}).layers
    mixes["uniform"] = spread(layers, bits)
    found = ends(layers, bits)
    return mixes if found is None else mixes | {"ends": found}


def spread(layers: Sequence[Layer], bits: float) -> Mix:
    """Mix the two widths about a budget evenly over the depth, by weights.

    In the model's order, a layer takes the wider one while the weights that have it stay within
    their share of those passed so far; what that leaves goes to layers in the same order.
    """
    widths = {parse_format(f).bits or 0: f for f in FORMATS}
    low = max(w for w in widths if w <= bits)
    high = min((w for w in widths if w > bits), default=low)
    total = sum(layer.numel for layer in layers)
    room = (bits - low) / max(high - low, 1) * total  # weights that can have the wider one
    wide: set[str] = set()
    given, passed = 0, 0
    for layer in layers:
        passed += layer.numel
        if given + layer.numel <= room * passed / total:
            wide.add(layer.name)
            given += layer.numel
    for layer in layers:
        if layer.name not in wide and given + layer.numel <= room:
            wide.add(layer.name)
            given += layer.numel
    return {x.name: widths[high if x.name in wide else low] for x in layers}


def ends(layers: Sequence[Layer], bits: float) -> Mix | None:
    """Give the first and the last layer 8 bits, and spread what is left, if it is enough."""
    outer = (layers[0], layers[-1])
    inner = layers[1:-1]
    left = bits * sum(x.numel for x in layers) - 8 * sum(x.numel for x in outer)
    each = left / sum(x.numel for x in inner)
    if each < min(parse_format(f).bits or 0 for f in FORMATS):
        return None
    return spread(inner, each) | {x.name: "int8-channel" for x in outer}


def bits_of(layers: Sequence[Layer], mix: Mapping[str, str]) -> float:
    used = sum(x.numel * (parse_format(mix[x.name]).bits or 0) for x in layers)
    return used / sum(x.numel for x in layers)


def table_of(rows: Mapping[str, list[Result]]) -> str:
    """Return a table, smallest KL first; errors of differences are over examples / over seeds."""
    ours = [r.found for r in rows[OURS]]
    head = ["way", "bits", "KL", "KL minus ours", "errors, a seed", "flips %", "accuracy %"]
    head += ["minus ours", "predicted: layers", "joint", "joint / measured"]
    head += ["quadratic", "linear logits", "parabola", "measured there"]
    head += ["linear / measured", "parabola / measured"]
    made = []
    for name, results in rows.items():
        found = [r.found for r in results]
        kl = stacked(found, "kl")
        gap = kl - stacked(ours, "kl")
        cells = [name, f"{np.mean([r.bits for r in results]):.3f}", _plus(kl)]
        cells += ["", ""] if name == OURS else [_plus(gap, "+"), _errors(gap)]
        flips, right = 100 * stacked(found, "flips"), 100 * stacked(found, "right")
        worse = right - 100 * stacked(ours, "right")
        cells += [_plus(flips, digits=2), _plus(right, digits=2)]
        cells.append("" if name == OURS else _plus(worse, "+", 2))
        told, joint, error = np.mean(
            [(r.predicted.kl, r.predicted.joint, r.predicted.joint_stderr) for r in results], 0
        )
        error /= np.sqrt(len(results))
        cells += [f"{told:.4f}", f"{joint:.4f} ± {error:.4f}", f"{joint / kl.mean():.2f}"]
        cells += _linear_cells([r.linear for r in results])
        made.append((float(kl.mean()), "| " + " | ".join(cells) + " |"))
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    was = 100 * stacked(ours, "was_right")
    return "\n".join([*lines, *(row for _, row in sorted(made))]) + (
        f"\n\nThe original: {_plus(was, digits=2)} % right.\n"
    )


def _linear_cells(found: Sequence[Linearized]) -> list[str]:
    """Return means over seeds, and the ratios of two predictions to what is measured."""
    names = ("quadratic", "kl", "parabolic", "measured")
    means = [np.mean([getattr(f, name) for f in found]) for name in names]
    ways = "" if {f.how for f in found} == {"forward"} else " by difference"
    return [
        *(f"{mean:.4f}" for mean in means),
        f"{_ratio(found, 'kl', '')}{ways}",
        _ratio(found, "parabolic", "parabolic_"),
    ]


def _ratio(found: Sequence[Linearized], name: str, prefix: str) -> str:
    """Return R = sum K / sum M over seeds with the error of sum (K - R M) / sum M, and each seed's.

    K is the prediction, M the measurement; seeds draw their examples independently, and with r the
    ratio of a seed and dr its paired error, K - R M has the error M dr.
    """
    measured = np.array([f.measured for f in found])
    ratios = np.array([getattr(f, f"{prefix}ratio") for f in found])
    errors = np.array([getattr(f, f"{prefix}ratio_stderr") for f in found])
    mean = sum(getattr(f, name) for f in found) / measured.sum()
    error = float(np.linalg.norm(measured * errors) / measured.sum())
    each = ", ".join(f"{r:.2f} ± {e:.2f}" for r, e in zip(ratios, errors, strict=True))
    return f"{mean:.3f} ± {error:.3f}" + (f" ({each})" if len(found) > 1 else "")


def _plus(values: np.ndarray, sign: str = "", digits: int = 4) -> str:
    mean, over_examples, over_seeds = mean_and_error(values)
    return f"{mean:{sign}.{digits}f} ± {over_examples:.{digits}f} / {over_seeds:.{digits}f}"


def _errors(gap: np.ndarray) -> str:
    """Return each seed's difference in its own paired standard errors."""
    each = gap.mean(1) / np.maximum(gap.std(1, ddof=1) / np.sqrt(gap.shape[1]), 1e-300)
    return ", ".join(f"{value:+.1f}" for value in each)


if __name__ == "__main__":
    main()
