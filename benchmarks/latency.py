"""Predicted against real: does a latency table foretell what ONNX Runtime takes for an allocation?

    python benchmarks/latency.py [--batch 8] [--threads 1] [--rounds 15]

For a ResNet-8 and a ResNet-20 on 28 x 28 images it measures a latency table, chooses mixes under
budgets of average bits and of latency, exports each to ONNX, and times the files. Weights are
random, which changes no time; scores are squared errors of weights times a random sensitivity of
each layer, so that mixes are scattered as a probe's are. Printed is what the table predicts beside
what the exported file takes, and what the layers timed one by one would say. Then tables are
measured around some of these mixes, and mixes chosen again.
Keep the machine idle meanwhile. Needs the extra `onnx`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import hawqkit as hk
from hawqkit.allocation import allocate_table, read_latencies
from hawqkit.errors import BudgetError
from hawqkit.formats import parse_format
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.activations import calibrate_activations
from hawqkit.quantize.errors_of import make_errors
from hawqkit.quantize.rounding import scale_dtype_for
from hawqkit.records import Allocation, Certificate, LatencyTable, Totals
from hawqkit.targets.onnx_timing import time_graphs

FORMATS = ("none", "w8a8", "int8-channel", "int4-channel")
AVERAGE_BITS = (24.0, 16.0, 12.0, 8.0, 6.0)
AGAIN = (24.0, 12.0, 6.0)
TIGHTER = 0.95  # of the latency of the mix that the bits alone choose
WANTED = 15.0  # percent
INPUT_ERROR = 3.0  # how much more an 8-bit input costs than 8-bit weights do, for the scores


class Block(nn.Module):
    """Two convolutions and a shortcut, batch norms folded."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, half the size where it strides."""
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet of 6 n + 2 layers for small images (He et al. 2016, section 4.2)."""

    def __init__(self, n: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1)
        widths = [width] * n + [2 * width] * n + [4 * width] * n
        before = [width, *widths[:-1]]
        self.blocks = nn.Sequential(
            *(Block(i, o, 1 if i == o else 2) for i, o in zip(before, widths, strict=True))
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (b, 10)."""
        return self.head(self.blocks(torch.relu(self.stem(image))).mean((2, 3)))


def build(n: int, batch: int) -> tuple[LoadedModel, Any]:
    generator = torch.Generator().manual_seed(n)
    net = ResNet(n)
    for parameter in net.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data.normal_(0.0, 1.4 * spread, generator=generator)
    images = torch.randn((max(batch, 2), 1, 28, 28), generator=generator)
    examples = hk.make_examples(images, torch.arange(len(images)) % 10, classes=10)
    return hk.wrap_model(net, name=f"ResNet-{6 * n + 2}"), examples


def scores(model: LoadedModel) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(0)
    table = np.zeros((len(model.layers), len(FORMATS)))
    forms = [parse_format(f) for f in FORMATS if f != "none"]
    for row, layer in enumerate(model.layers):
        errors = make_errors(
            model.weight(layer.name),
            [f.weights for f in forms],
            rounding="nearest",
            scale_dtype=scale_dtype_for(layer.dtype),
            keep="none",
        )
        factors = [1.0 if f.activation_bits is None else INPUT_ERROR for f in forms]
        table[row, 1:] = errors.squared_norms.numpy() * factors * generator.lognormal(0.0, 2.0)
    return table


def choose(
    model: LoadedModel, table: LatencyTable, bits: Sequence[float]
) -> list[tuple[str, dict[str, str]]]:
    """Return mixes under limits of bits, and of bits and latency together."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "latency.csv"
        hk.write_latencies(table, path)
        costs = read_latencies(path).costs(model.layers, FORMATS)
    values = scores(model)
    found: list[tuple[str, dict[str, str]]] = []
    for limit in bits:
        budgets = {"average_bits": limit, "latency_ms": 1e6}
        first = allocate_table(model.layers, FORMATS, values, budgets=budgets, costs=[costs])
        found.append((f"{limit:g} bits", first.layers))
        assert first.totals.latency_ms is not None
        budgets["latency_ms"] = TIGHTER * first.totals.latency_ms
        try:
            second = allocate_table(model.layers, FORMATS, values, budgets=budgets, costs=[costs])
        except BudgetError:
            continue
        found.append((f"{limit:g} bits, {budgets['latency_ms']:.3f} ms", second.layers))
    return found


def exported(
    model: LoadedModel, examples: Any, mixes: Sequence[dict[str, str]], folder: Path
) -> list[Any]:
    ranges = calibrate_activations(model, examples, model.layers, [8])
    graphs = []
    for index, mix in enumerate(mixes):
        allocation = Allocation(
            layers=mix,
            budgets={},
            totals=Totals(0.0, 0.0),
            runtime="transformers",
            score="weight-error",
            risk=0.0,
            objective=0.0,
            certificate=Certificate("", "optimal", 0.0, 0.0, 0.0, 0, 0),
            rounding="nearest",
            activations=ranges,
        )
        place = folder / str(index)
        hk.export(allocation, "onnx", place, model=model, examples=examples)
        graphs.append(onnx.load(place / "model.onnx"))
    return graphs


def alone(table: LatencyTable, mix: dict[str, str]) -> float:
    return sum(row.alone for row in table.rows if mix[row.layer] == row.format)


def compare(
    model: LoadedModel,
    examples: Any,
    predicted: Sequence[tuple[str, dict[str, str], LatencyTable]],
    options: argparse.Namespace,
) -> None:
    """Export mixes, time the files, and print what their tables said beside that."""
    with tempfile.TemporaryDirectory() as scratch:
        graphs = exported(model, examples, [mix for _, mix, _ in predicted], Path(scratch))
    feed = {"image": examples.inputs["(first)"][: options.batch].numpy()}
    times, errors = time_graphs(
        [(graph, feed) for graph in graphs], threads=options.threads, rounds=options.rounds, seed=1
    )
    print(f"{'mix':24}{'formats':48}{'real ms':>16}{'table':>9}{'off':>8}{'alone':>9}{'off':>8}")
    offs = []
    for (name, mix, table), real, error in zip(predicted, times, errors, strict=True):
        count = Counter(mix.values())
        formats = ", ".join(f"{count[f]} {f}" for f in FORMATS if count[f])
        found, single = table.predict(mix), alone(table, mix)
        offs.append(100 * (found / real - 1))
        print(
            f"{name:24}{formats:48}{real:9.3f} ±{error:5.3f}{found:9.3f}{offs[-1]:+7.1f}%"
            f"{single:9.3f}{100 * (single / real - 1):+7.1f}%"
        )
    worst, typical = max(map(abs, offs)), float(np.sqrt(np.mean(np.square(offs))))
    verdict = "within" if worst <= WANTED else "NOT within"
    print(
        f"off by {typical:.1f} % (root mean square), at most {worst:.1f} %: {verdict} {WANTED:g} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 3], help="n of 6 n + 2 layers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for n in options.blocks:
        model, examples = build(n, options.batch)
        settings = {"batch": options.batch, "threads": options.threads, "rounds": options.rounds}
        start = time.perf_counter()
        table = hk.measure_latency(model, examples, FORMATS, **settings)
        seconds = time.perf_counter() - start
        print(
            f"\n{model.facts.source}, batch {options.batch}, {table.runtime}, {options.threads} "
            f"threads: {len(table.rows)} rows in {seconds:.0f} s, misfit {100 * table.misfit:.1f} %"
        )
        uniform = [(f, {x.name: f for x in model.layers}) for f in FORMATS]
        chosen = choose(model, table, AVERAGE_BITS)
        compare(model, examples, [(*mix, table) for mix in [*uniform, *chosen]], options)
        print("measured again around the mix of a first table, and chosen again:")
        again = []
        for bits in AGAIN:
            _, near = choose(model, table, [bits])[-1]
            local = hk.measure_latency(model, examples, FORMATS, near=near, **settings)
            again += [(*mix, local) for mix in choose(model, local, [bits])]
        compare(model, examples, again, options)


if __name__ == "__main__":
    main()
