"""Small networks with labels that they can learn, and mixes to tune."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hawqkit.models.examples import Examples, make_examples
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.quantize.activations import calibrate_activations
from hawqkit.records import ActivationRanges, Allocation, Certificate, Totals


class SmallNet(nn.Module):
    """Two convolutions with batch norms and a head."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 2, H, W) to (B, classes)."""
        x = self.norm1(self.conv1(x)).relu()
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def small_data(count: int = 64, *, seed: int = 0, withheld: int = 0) -> Examples:
    """Return images whose class is the quarter of a circle that two channels' means lie in."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(count, 2, 1, 1, generator=generator)
    images = centers + 0.5 * torch.randn(count, 2, 6, 6, generator=generator)
    means = images.mean((2, 3))
    labels = 2 * (means[:, 0] > 0) + (means[:, 1] > 0)
    return make_examples(images, labels.long(), classes=4, withheld=withheld, source="quarters")


def small_model(
    seed: int = 0, *, steps: int = 150, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Return a small network that was trained a little, in evaluation mode."""
    net = SmallNet()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
        net.head.bias.zero_()
    data = small_data(128, seed=seed + 1)
    (images,) = data.inputs.values()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), data.labels).backward()
        optimizer.step()
    return wrap_model(net.to(dtype), name="small")


def uniform(model: LoadedModel, format: str) -> dict[str, str]:
    """Return a mix of one format."""
    return {layer.name: format for layer in model.layers}


def ranges_of(model: LoadedModel, data: Examples, bits: int) -> ActivationRanges:
    """Return static ranges of all inputs."""
    return calibrate_activations(model, data, model.layers, [bits])


def allocation_of(
    model: LoadedModel,
    mix: Mapping[str, str],
    *,
    rounding: str = "searched",
    activations: ActivationRanges | None = None,
) -> Allocation:
    """Return an allocation as if it had been chosen for a model."""
    return Allocation(
        layers=dict(mix),
        budgets={"average_bits": 4.0},
        totals=Totals(4.0, 4.25),
        runtime="transformers",
        score="trace",
        risk=0.0,
        objective=0.0,
        certificate=Certificate("test", "optimal", 0.0, 0.0, 0.0, len(mix), len(mix)),
        model=model.facts.hash,
        sensitivities="of a test",
        rounding=rounding,
        activations=activations,
    )
