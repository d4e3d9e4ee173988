"""What the probe of a convolutional network costs over a forward and backward pass of training.

    python benchmarks/classifiers/cost.py [--batch 64] [--rounds 7]

ResNet-20 on 28 x 28 images, with its first convolution at stride 2 (as `subjects.py` trains it,
maps of 14 x 14 and less) and at stride 1 (28 x 28 and less); random weights and images, one thread.
Rounds take the two passes in turn; printed are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from networks import ResNet
from torch import nn

import hawqkit as hk
from hawqkit.models import Examples
from hawqkit.models.model import LoadedModel
from hawqkit.sensitivity.fitting import ranges_for
from hawqkit.sensitivity.probing import Prober, ProbeSettings

SIX = tuple(f"int{bits}-channel" for bits in (2, 3, 4, 5, 6, 8))
LISTS = {
    "6 of weights": SIX,
    "12 of weights": (*SIX, *(f"{name}-asym" for name in SIX)),
    "6, inputs of one width": tuple(f"w{bits}a8" for bits in (2, 3, 4, 5, 6, 8)),
    "12, inputs of two widths": tuple(f"w{w}a{a}" for a in (8, 4) for w in (2, 3, 4, 5, 6, 8)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    count = args.batch * (args.rounds + 1)
    images = torch.randn(count, 1, 28, 28, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    data = hk.make_examples(images, labels, classes=10)
    print("| maps | formats | trace and directional | with the token score |")
    print("|---|---|---|---|")
    for stride, maps in ((1, "28 x 28"), (2, "14 x 14")):
        network = ResNet(3)
        network.conv1.stride = (stride, stride)
        model = hk.wrap_model(network, name="resnet20")
        for what, formats in LISTS.items():
            cells = [
                f"{ratio(model, data, formats, positions, args.batch, args.rounds):.2f}"
                for positions in (0, 16)
            ]
            print(f"| {maps} | {what} | {' | '.join(cells)} |", flush=True)


def ratio(
    model: LoadedModel,
    data: Examples,
    formats: tuple[str, ...],
    positions: int,
    batch: int,
    rounds: int,
) -> float:
    """Return the probe's time over that of a pass with the gradients of all weights."""
    settings = ProbeSettings(batch=batch, positions=positions)
    ranges = ranges_for(model, data, formats, "refuse")  # found once, before the probe
    prober = Prober(model, data, formats, settings, None, ranges)
    prober.prepare()
    found = []
    for number in range(rounds + 1):
        rows = slice(number * batch, (number + 1) * batch)
        x, y = next(iter(data.inputs.values()))[rows], data.labels[rows]
        plain = seconds(lambda x=x, y=y: train_pass(model.module, x, y))
        with prober:
            probed = seconds(lambda number=number: prober.measure(number))
        if number:  # the first of each pays for fresh memory
            found.append(probed / plain)
    return median(found)


def train_pass(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    weights = [
        child.weight for child in module.modules() if isinstance(child, nn.Conv2d | nn.Linear)
    ]
    for weight in weights:
        weight.requires_grad_(True)
    torch.autograd.grad(nn.functional.cross_entropy(module(x), y), weights)
    for weight in weights:
        weight.requires_grad_(False)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
