"""Seconds until every layer's trace has a relative standard error of 5 %, against two peers.

    .venv/bin/python layer_traces.py [--networks transformer resnet smooth-resnet]
        [--kinds gauss-newton hessian] [--relative-error 0.05] [--cap 1024] [--blocks 6]
        [--width 128] [--sequences 4] [--length 32] [--images 64]

Measured are tr(H_l), of each layer's diagonal block of the Hessian, and tr(G_l), of the generalized
Gauss-Newton matrix's, of one network on the same data in float32 with the same threads.

- hawqkit: `layer_traces`, all layers in one call.
- curvlinops: one `HessianLinearOperator` or `GGNLinearOperator` a layer, without the checks of
  determinism and the count of data that its constructor makes; the samples are those of its
  `hutchinson_trace`, which multiplies by all vectors of a call together.
- hessian-eigenthings: one `HessianOperator` or `GGNOperator` a layer and its `hutchinson`, which
  multiplies by one vector at a time.

Neither peer has a stopping rule, so both get hawqkit's own for probes that all data share: 16
probes, then as many more as the standard error asks for, at most four times what there are and 128
at once. The peers take turns layer by layer, and hawqkit is measured before and after them, so that
a busy machine slows all alike.

Columns: seconds (of hawqkit the mean of two runs), their ratio to hawqkit's, products spent over
all layers (hawqkit's Gauss-Newton probes are one backward pass for all layers together, and count
once), the largest relative standard error, and how far the values are from hawqkit's: the root mean
square over layers of the difference over its standard error, about 1 where both are right. The
default takes five minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import curvlinops
import hessian_eigenthings as eigenthings
import numpy as np
import torch
from hessian_eigenthings.loss_fns import (
    supervised_forward,
    supervised_loss,
    supervised_loss_of_output,
)
from models import TokenLoss, Workload, resnet, transformer
from numpy.typing import NDArray
from torch import nn

import hawqkit as hk

Draw = Callable[[int], NDArray[np.float64]]  # how many -> samples of v' A v

FIRST, GROWTH, LARGEST = 16, 4, 128
PEERS = ("curvlinops", "hessian-eigenthings")


@dataclass(slots=True)
class Result:
    """What one library took and found."""

    seconds: float = 0.0
    products: int = 0
    means: list[float] = field(default_factory=list)
    stderrs: list[float] = field(default_factory=list)


def main() -> None:
    args = arguments()
    warm_up()
    for name in args.networks:
        workload = network(name, args)
        count = sum(p.numel() for p in workload.model.parameters())
        print(
            f"\n{name}: {len(workload.layers)} layers, {count:,} parameters, inputs "
            f"{tuple(workload.batches[0][0].shape)}, loss {workload.loss:.2f}, "
            f"{torch.get_num_threads()} threads",
            flush=True,
        )
        for kind in args.kinds:
            compare(workload, kind, args.relative_error, args.cap)


def warm_up() -> None:
    """Run everything once on next to nothing: what a first call loads is no part of the price."""
    tiny = transformer(blocks=1, width=32, sequences=2, length=8, steps=1)
    for workload in (tiny, resnet(width=4, images=4, steps=1)):
        for kind in ("gauss-newton", "hessian"):
            measure_ours(workload, kind, 1.0, FIRST, seed=0)
            for peer in PEERS:
                draw = draw_of(peer, workload, workload.layers[-1], kind)
                measure_peer(Result(), draw, 1.0, FIRST)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    networks = ("transformer", "resnet", "smooth-resnet")
    kinds = ("gauss-newton", "hessian")
    parser.add_argument("--networks", nargs="+", choices=networks, default=networks[:2])
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--relative-error", type=float, default=0.05)
    parser.add_argument("--cap", type=int, default=1024, help="probes of a layer at most")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--images", type=int, default=64)
    return parser.parse_args()


def network(name: str, args: argparse.Namespace) -> Workload:
    if name == "transformer":
        return transformer(
            blocks=args.blocks, width=args.width, sequences=args.sequences, length=args.length
        )
    return resnet(images=args.images, smooth=name == "smooth-resnet")


def compare(workload: Workload, kind: str, relative_error: float, cap: int) -> None:
    """Measure all three, and print the table of one kind of matrix."""
    results = {"hawqkit": Result(), **{peer: Result() for peer in PEERS}}
    ours = [measure_ours(workload, kind, relative_error, cap, seed=0)]
    for layer in workload.layers:
        for peer in PEERS:
            measure_peer(results[peer], draw_of(peer, workload, layer, kind), relative_error, cap)
    ours.append(measure_ours(workload, kind, relative_error, cap, seed=1))
    results["hawqkit"] = ours[0]
    results["hawqkit"].seconds = (ours[0].seconds + ours[1].seconds) / 2
    print(f"  {kind:20s}  seconds   ratio   products   largest error   from hawqkit's")
    for name, found in results.items():
        errors = np.array(found.stderrs) / np.abs(found.means)
        ratio = found.seconds / ours[0].seconds
        print(
            f"  {name:20s}  {found.seconds:7.2f}  {ratio:6.1f}  {found.products:9d}  "
            f"{errors.max():13.1%}   {distance(found, ours[0]):>14s}",
            flush=True,
        )


def distance(found: Result, ours: Result) -> str:
    if found is ours:
        return ""
    apart = np.subtract(found.means, ours.means) / np.hypot(found.stderrs, ours.stderrs)
    return f"{np.sqrt((apart**2).mean()):.1f}"


def measure_ours(
    workload: Workload, kind: str, relative_error: float, cap: int, seed: int
) -> Result:
    start = time.perf_counter()
    found = hk.layer_traces(
        workload.model,
        hk.cross_entropy(),
        workload.batches,
        layers=workload.layers,
        kind=kind,
        relative_error=relative_error,
        max_probes=cap,
        seed=seed,
    )
    seconds = time.perf_counter() - start
    estimates = list(found.values())
    products = [e.products for e in estimates]
    return Result(
        seconds,
        max(products) if kind == "gauss-newton" else sum(products),
        [e.value for e in estimates],
        [e.stderr for e in estimates],
    )


def measure_peer(result: Result, draw: Draw, relative_error: float, cap: int) -> None:
    """Draw samples of one layer until their standard error is small enough."""
    start = time.perf_counter()
    samples = draw(FIRST)
    while True:
        have, mean = len(samples), samples.mean()
        stderr = samples.std(ddof=1) / np.sqrt(have)
        if stderr <= relative_error * abs(mean) or have >= cap:
            break
        needed = int(have * (stderr / (relative_error * abs(mean))) ** 2) + 1
        more = min(max(needed - have, 2), (GROWTH - 1) * have, LARGEST, cap - have)
        samples = np.concatenate([samples, draw(more)])
    result.seconds += time.perf_counter() - start
    result.products += len(samples)
    result.means.append(float(mean))
    result.stderrs.append(float(stderr))


def draw_of(peer: str, workload: Workload, layer: str, kind: str) -> Draw:
    """Return what draws a peer's samples of one layer, on an operator of that layer alone."""
    if peer == "curvlinops":
        return draw_by_curvlinops(workload, workload.weight(layer), kind)
    return draw_by_eigenthings(workload, workload.weight(layer), kind)


def draw_by_curvlinops(workload: Workload, weight: nn.Parameter, kind: str) -> Draw:
    make = curvlinops.HessianLinearOperator
    if kind == "gauss-newton":
        make = curvlinops.GGNLinearOperator
    examples = sum(len(x) for x, _ in workload.batches)
    operator = make(
        workload.model,
        TokenLoss(),
        [weight],
        workload.batches,
        check_deterministic=False,
        num_data=examples,
    )
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> NDArray[np.float64]:
        shape = (weight.numel(), count)
        signs = torch.randint(0, 2, shape, generator=generator).to(weight.dtype) * 2 - 1
        return torch.einsum("ij,ij->j", signs, operator @ signs).double().numpy()

    return draw


def draw_by_eigenthings(workload: Workload, weight: nn.Parameter, kind: str) -> Draw:
    def wanted(_: str, parameter: nn.Parameter) -> bool:
        return parameter is weight

    criterion = TokenLoss()
    if kind == "gauss-newton":
        operator = eigenthings.GGNOperator(
            workload.model,
            workload.batches,
            supervised_forward,
            supervised_loss_of_output(criterion),
            param_filter=wanted,
        )
    else:
        operator = eigenthings.HessianOperator(
            workload.model, workload.batches, supervised_loss(criterion), param_filter=wanted
        )
    seeds = iter(range(1_000_000))

    def draw(count: int) -> NDArray[np.float64]:
        found = eigenthings.hutchinson(operator, num_samples=count, seed=next(seeds))
        return found.samples.detach().double().numpy()

    return draw


if __name__ == "__main__":
    main()
