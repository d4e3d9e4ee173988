"""Any network with any loss: a denoiser with Huber's loss, in 4 bits on average.

    python examples/any_loss.py [pictures]

The loss is given as a function of outputs and targets alone; the probe finds what it needs of its
second derivative by itself. Printed for each mix: the predicted and the measured increase of the
mean loss over pictures that nothing has seen.
"""

import sys
from typing import Any

import torch
from torch import nn

import hawqkit as hk

SIZE = 12


def pictures(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy and clean pictures (count, 1, SIZE, SIZE) of waves."""
    at = torch.arange(SIZE) / SIZE
    wave = torch.rand(4, count, 1, 1, generator=generator)
    clean = torch.sin(6 * wave[0] * at + 6 * wave[1]) * torch.cos(
        6 * wave[2] * at[:, None] + wave[3]
    )
    noise = 0.3 * torch.randn(clean.shape, generator=generator)
    return (clean + noise)[:, None], clean[:, None]


def trained(noisy: torch.Tensor, clean: torch.Tensor, generator: torch.Generator) -> nn.Module:
    """Return a small denoiser after 300 steps of Adam."""
    net = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 1, 3, padding=1),
    )  # fmt: skip
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.0
        parameter.data = scale * noise
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        some = torch.randint(len(noisy), (48,), generator=generator)
        optimizer.zero_grad()
        nn.functional.huber_loss(net(noisy[some]), clean[some]).backward()
        optimizer.step()
        schedule.step()
    return net


def huber(z: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
    """Return the summed loss of a batch and how many numbers it is over."""
    return nn.functional.huber_loss(z, batch.labels, reduction="sum"), z.numel()


def main(count: int = 256) -> hk.LossMeasurement:
    """Probe, choose 4 bits on average, and measure what that adds to the loss."""
    generator = torch.Generator().manual_seed(0)
    noisy, clean = pictures(count, generator)
    net = trained(noisy, clean, generator)

    objective = hk.Objective(hk.squared_error().outputs, huber, name="Huber loss")
    model = hk.wrap_model(net, name="denoiser")
    examples = hk.make_examples(noisy, targets=clean, withheld=count // 2)
    formats = ["int2-channel", "int3-channel", "int4-channel", "int6-channel", "int8-channel"]
    sensitivities = hk.probe(model, examples, formats, objective=objective)
    allocation = hk.allocate(sensitivities, average_bits=4.0, baselines=["uniform"])

    noisy, clean = pictures(count, generator)
    fresh = hk.make_examples(noisy, targets=clean)
    measured = hk.measure_loss(model, allocation, fresh, objective)
    print(f"{objective.name} of the original {measured.original:.5f}")
    for mix in measured.mixes:
        predicted = mix.prediction
        print(
            f"{mix.name:8} predicted +{predicted.joint:.6f} +- {predicted.joint_stderr:.6f}, "
            f"measured {mix.increase:+.6f} +- {mix.increase_stderr:.6f}, of it second order and "
            f"beyond {mix.curved:+.6f}"
        )
    return measured


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
