"""Outliers, the parts of G by classes and the gradient's share, while a small classifier learns.

    python benchmarks/structure.py [--only NAME] [--steps N]

Ten classes of points, an MLP with tanh, stochastic gradient descent; no download. `apart` has tight
clusters around orthogonal centers, and weight decay; `overlapping` has wide ones around random
centers. Prints, for a few checkpoints, where the spectra of H and G have their widest gap, what
gaps there are after C - 1, C and C (C - 1) eigenvalues, how the trace of G divides among its parts,
how much of the top C eigenvectors of H the class means span, and the gradient's share of them; then
that share alone for other ways to step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hawqkit as hk
from hawqkit.estimators.ranks import dense_spectrum

CLASSES, INPUTS, HIDDEN, EACH = 10, 20, 24, 60
RATE, BATCH = 0.1, 20
State = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """Data and training.

    Attributes:
        orthogonal: whether class centers are; else they are random.
        spread: standard deviation of a class's points; centers have a length of about 6.
        decay: of the weights.
    """

    orthogonal: bool
    spread: float
    decay: float


SETTINGS = {"apart": Setting(True, 0.3, 0.01), "overlapping": Setting(False, 2.5, 0.0)}


def data(setting: Setting) -> tuple[Tensor, Tensor]:
    """Return points around the centers of their classes, shuffled, and their labels."""
    generator = torch.Generator().manual_seed(0)
    centers = 1.5 * torch.randn(CLASSES, INPUTS, generator=generator, dtype=torch.float64)
    if setting.orthogonal:
        centers = 6 * torch.eye(CLASSES, INPUTS, dtype=torch.float64)
    y = torch.arange(CLASSES * EACH) % CLASSES
    noise = torch.randn(len(y), INPUTS, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(y), generator=generator)
    return (centers[y] + setting.spread * noise)[order], y[order]


def network() -> nn.Sequential:
    """Return the MLP with weights from a generator of its own."""
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.shape[-1] ** 0.5)
    return model.eval()


def training(
    x: Tensor, y: Tensor, at: list[int], decay: float, *, rate: float = RATE, batch: int = BATCH
) -> Iterator[State]:
    """Train from the start and yield the states at some steps."""
    model, generator = network(), torch.Generator().manual_seed(2)
    for step in range(max(at) + 1):
        if step in at:
            yield {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rows = torch.randperm(len(x), generator=generator)[:batch]
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= rate * (g + decay * p)


def show(name: str, spectrum: hk.Density) -> None:
    """Print a spectrum's outliers in a few words."""
    found = hk.outliers(spectrum, CLASSES)
    gaps = [f"{found.gap(k) or 0:.2f} after {k}" for k in found.expected.values()]
    print(f"  {name}: {found.count} outliers, widest gap {found.ratio:.2f}; {', '.join(gaps)}")


def checkpoint(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Print what one state has of structure."""
    H = hk.hessian(model, hk.cross_entropy(), batches)
    parts = hk.class_decomposition(model, hk.cross_entropy(), batches)
    show("H", dense_spectrum(H))
    show("G", dense_spectrum(parts.whole))
    traces = {name: float(op.dense().trace()) for name, op in parts.parts().items()}
    total = sum(traces.values())
    print("  trace of G: " + ", ".join(f"{n} {t / total:.0%}" for n, t in traces.items()))
    kept, cross = parts.class_values, parts.cross_values[: CLASSES * (CLASSES - 2)]
    print(f"  class part {kept[0]:.3g} to {kept[-1]:.3g}, cross {cross[0]:.3g} to {cross[-1]:.3g}")
    top = hk.top_eigenpairs(H, CLASSES, largest="algebraic").vectors
    values, vectors = torch.linalg.eigh(parts.class_part.dense())
    means = vectors[:, values > 1e-9 * values.max()]
    overlap = float((means.T @ top).square().sum()) / CLASSES
    print(f"  the class means span {overlap:.0%} of the top {CLASSES} eigenvectors of H")


def measure(setting: Setting, steps: int) -> None:
    """Print a setting's checkpoints and shares."""
    x, y = data(setting)
    batches = [(x[i : i + 200], y[i : i + 200]) for i in range(0, len(x), 200)]
    at, model = [0, steps // 20, steps // 4, steps], network()
    for step, state in zip(at, training(x, y, at, setting.decay), strict=True):
        model.load_state_dict(state)
        with torch.no_grad():
            z = model(x)
        right = float((z.argmax(1) == y).double().mean())
        loss = float(nn.functional.cross_entropy(z, y))
        print(f"step {step}: loss {loss:.3f}, accuracy {right:.1%}")
        checkpoint(model, batches)
        sys.stdout.flush()
    print(f"share of the gradient in the top {CLASSES} eigenvectors of H, at steps {at}")
    for rate, batch in ((RATE, BATCH), (RATE, len(x)), (0.5, BATCH)):
        states = training(x, y, at, setting.decay, rate=rate, batch=batch)
        found = hk.gradient_shares(
            model, hk.cross_entropy(), batches, states, k=CLASSES, tolerance=1e-5
        )
        numbers = ", ".join(f"{share.share:.3f}" for share in found)
        print(f"  rate {rate}, batches of {batch}: {numbers}; random {found[0].null:.3f}")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    model = network()
    weights = sum(p.numel() for p in model.parameters())
    print(f"torch {torch.__version__}; {weights} weights, {CLASSES} classes")
    for name, setting in SETTINGS.items():
        if arguments.only in (None, name):
            print(f"{name}: {setting}")
            measure(setting, arguments.steps)


if __name__ == "__main__":
    main()
