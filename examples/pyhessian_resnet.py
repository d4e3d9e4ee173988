"""PyHessian's ResNet example: top eigenvalues, trace, spectral density, and the loss along the top.

    python examples/pyhessian_resnet.py FOLDER [training steps] [images]

https://github.com/amirgholami/PyHessian (its ResNet-20 on CIFAR-10). Here a ResNet-8 is trained for
a few seconds on images of ten noisy patterns, so that nothing has to be downloaded. Pictures go
into FOLDER; they need matplotlib (`pip install 'hawqkit[plots]'`).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import hawqkit as hk


class Block(nn.Module):
    """Two convolutions with batch norm, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.around = nn.Identity() if inputs == outputs else around

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.around(x)).relu()


def resnet8(width: int = 8, classes: int = 10) -> nn.Sequential:
    """Return a ResNet of one block in each of three stages (He et al. 2016, section 4.2)."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes),
    )  # fmt: skip


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noisy images (count, 3, 16, 16) of ten smooth patterns, and their labels."""
    patterns = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(100))
    patterns = nn.functional.interpolate(patterns, size=16, mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 10
    return patterns[y] + 1.5 * torch.randn(count, 3, 16, 16, generator=generator), y


def trained(steps: int) -> nn.Sequential:
    """Return the network in eval mode after some steps of SGD on fresh images."""
    net = resnet8()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            fan = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) * (2 / fan) ** 0.5
    net[-1].bias.data.zero_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        x, y = images(64, seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def draw_density(density: hk.Density, path: Path) -> None:
    """Draw the spectral density as PyHessian does, on a linear and a logarithmic axis."""
    from matplotlib.figure import Figure

    top = density.largest
    grid = np.linspace(-0.15 * top, 1.1 * top, 1000)
    width = top / 150
    low, high = density.band(grid, width)
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    axes = figure.subplots()
    curve = density.evaluate(grid, width)
    axes.semilogy(grid, curve)
    axes.fill_between(grid, low, high, alpha=0.3, linewidth=0, label="95 % over draws")
    near = density.mass(-0.01 * top, 0.01 * top)
    axes.set_title(
        f"{100 * near.value:.1f} % of eigenvalues within ±1 % of the largest", loc="left"
    )
    axes.set_ylim(1e-2 / density.size, 3 * curve.max())  # from far below one eigenvalue
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_ylabel("density, share of eigenvalues per unit")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(folder: str, steps: int = 80, count: int = 96) -> dict[str, object]:
    """Print what PyHessian prints, with errors, and draw density and landscape into a folder."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    net, objective = trained(steps), hk.cross_entropy()
    x, y = images(count, seed=12345)
    batches = list(zip(x.split(64), y.split(64), strict=True))
    H = hk.hessian(net, objective, batches)

    pairs = hk.top_eigenpairs(H, 2, tolerance=1e-4)
    for value, residual in zip(pairs.values, pairs.residuals, strict=True):
        print(f"top eigenvalue {value:.4f}, residual {residual:.1e}")
    trace = hk.trace(H, products=32)
    print(f"trace {trace.value:.2f} ± {trace.stderr:.2f}, {trace.products} products")
    density = hk.density(H, steps=30, draws=3)
    draw_density(density, home / "density.png")

    line = hk.loss_landscape(net, objective, batches, directions=[pairs], distance=0.5)
    hk.draw_landscape(line, home / "top-eigenvector.png")
    plane = hk.loss_landscape(net, objective, batches, directions=pairs, steps=11, distance=0.5)
    hk.draw_landscape(plane, home / "plane.png")
    hk.draw_landscape(plane, home / "surface.png", view="surface")
    print(f"{H.size} parameters, loss {line.center:.4f}, pictures in {home}")
    return {"pairs": pairs, "trace": trace, "density": density, "line": line, "plane": plane}


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
