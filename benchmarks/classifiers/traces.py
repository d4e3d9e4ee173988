"""The trace of every layer three ways: the probe's tr(G), Gauss-Newton probes, Hutchinson's tr(H).

    python benchmarks/classifiers/traces.py [SUBJECT] [--examples 256] [--error 0.03]

A network of convolutions, frozen batch norms and ReLU is piecewise linear in each layer's weight,
so tr(H_l) = tr(G_l) there, and three estimates of one number must agree within their errors. The
probe's error is over examples, and so holds more than the draws of labels that set it apart from
the other two on the same examples.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from scipy.stats import spearmanr
from subjects import SUBJECTS

import hawqkit as hk
from hawqkit.curvature.layer_traces import layer_traces
from hawqkit.sensitivity.probing import ProbeSettings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", nargs="?", default="resnet20", choices=sorted(SUBJECTS))
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--error", type=float, default=0.03, help="relative error to reach")
    args = parser.parse_args()
    torch.set_num_threads(1)
    subject = SUBJECTS[args.subject]()
    part = subject.calibration.take(slice(0, args.examples))
    (inputs,) = part.inputs.values()
    model = hk.wrap_model(subject.module, name=subject.name)
    data = hk.make_examples(inputs, part.labels, classes=int(subject.held_out.labels.max()) + 1)
    names = [layer.name for layer in model.layers]
    found = {
        kind: layer_traces(
            model,
            hk.cross_entropy(),
            list(data.micro_batches(32)),
            layers=names,
            kind=kind,
            relative_error=args.error,
            max_probes=4096,
        )
        for kind in ("hessian", "gauss-newton")
    }
    probed = hk.probe(model, data, ["int4-channel"], settings=ProbeSettings(positions=0))
    print(f"{subject.name}, {args.examples} examples; traces with relative standard errors")
    print("| layer | tr(H), Hutchinson | tr(G), output signs | tr(G), probe | H / G | in errors |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for i, name in enumerate(names):
        h, g = found["hessian"][name], found["gauss-newton"][name]
        trace, error = probed.trace[i], probed.trace_stderr[i]
        assert trace is not None
        assert error is not None
        spread = float(np.hypot(h.stderr, g.stderr))
        ratios.append((h.value - g.value) / spread)
        cells = [f"{v:.4g} ± {100 * e / abs(v):.1f} %" for v, e in _pairs(h, g, trace, error)]
        print(f"| {name} | {' | '.join(cells)} | {h.value / g.value:.3f} | {ratios[-1]:+.1f} |")
    hessian = [found["hessian"][n].value for n in names]
    for what, other in (
        ("output signs", [found["gauss-newton"][n].value for n in names]),
        ("the probe", [t or 0.0 for t in probed.trace]),
    ):
        print(f"Spearman of tr(H) and tr(G) by {what}: {spearmanr(hessian, other).statistic:.4f}")
    square = float(np.mean(np.square(ratios)))
    print(
        f"root mean square of (H - G) / error: {square**0.5:.2f}, "
        f"the largest {max(map(abs, ratios)):.1f}"
    )


def _pairs(h: hk.Estimate, g: hk.Estimate, trace: float, error: float) -> list[tuple[float, float]]:
    return [(h.value, h.stderr), (g.value, g.stderr), (trace, error)]


if __name__ == "__main__":
    main()
