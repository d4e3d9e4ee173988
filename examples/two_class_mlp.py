"""A two-class network whose whole spectrum is computed densely, beside what Lanczos finds of it.

    python examples/two_class_mlp.py [hidden units]

Two rings of points, two hidden layers, softmax cross-entropy: a few large eigenvalues, and most of
the others near zero. How many are "zero" depends on the threshold, so each count and each mass near
zero comes with its eps and an interval; where quadrature resolves no more, with the interval alone.
"""

import sys

import torch
from torch import nn

import hawqkit as hk

EPS = (1e-2, 1e-4, 1e-6)  # absolute, in nats per squared distance in weight space


def rings(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points (count, 2) on two noisy rings, and which ring each is on."""
    labels = torch.arange(count) % 2
    angle = 2 * torch.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    radius = 1.0 + labels + 0.2 * torch.randn(count, generator=generator, dtype=torch.float64)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), labels


def trained(hidden: int, generator: torch.Generator) -> tuple[nn.Module, list[object]]:
    """Return a network in float64 after 150 steps of Adam, and its data."""
    net = nn.Sequential(
        nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2)
    ).double()
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = noise / parameter.shape[-1] ** 0.5
    x, y = rings(200, generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval(), [(x, y)]


def described(estimate: hk.Estimate, places: int) -> str:
    """Return an estimate with its interval; the interval alone where nothing else is known."""
    low, high = estimate.interval or (estimate.value, estimate.value)
    between = f"95 % interval {low:.{places}f} to {high:.{places}f}"
    return between if "unresolved" in estimate.note else f"{estimate.value:.{places}f}, {between}"


def main(hidden: int = 44) -> dict[str, object]:
    """Print a table of dense against estimated, and return both."""
    net, batches = trained(hidden, torch.Generator().manual_seed(0))
    H = hk.hessian(net, hk.cross_entropy(), batches)
    exact = torch.linalg.eigvalsh(H.dense())  # n products, and n^2 numbers
    largest = exact[exact.abs().argsort(descending=True)]

    before = H.products
    pairs = hk.top_eigenpairs(H, 5)
    density = hk.density(H, steps=60, draws=10, deflated=pairs)
    ranks = hk.rank(H, EPS)

    print(f"{H.size} parameters; dense: {before} products, Lanczos: {H.products - before}")
    print(f"{'':24}{'dense':>12}  estimated")
    for i, (value, residual) in enumerate(zip(pairs.values, pairs.residuals, strict=True)):
        print(f"{f'eigenvalue {i + 1}':24}{largest[i]:12.6f}  {value:.6f}, residual {residual:.0e}")
    for eps, count in zip(ranks.eps, ranks.counts, strict=True):
        mass = density.mass(-eps, eps)
        dense = exact.abs() < eps
        print(f"{f'rank, eps = {eps:g}':24}{int((~dense).sum()):12}  {described(count, 0)}")
        print(f"{f'mass within ±{eps:g}':24}{dense.double().mean():12.4f}  {described(mass, 4)}")
    return {"exact": exact, "pairs": pairs, "density": density, "ranks": ranks}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
