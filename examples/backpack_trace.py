"""BackPACK's use case, Hutchinson's trace of every layer, beside the exact one.

    python examples/backpack_trace.py [relative error]

https://docs.backpack.pt/en/master/use_cases/example_trace_estimation.html
"""

import sys

import torch
from torch import nn

import hawqkit as hk


def main(relative_error: float = 0.05) -> dict[str, tuple[hk.Estimate, float]]:
    """Print and return (estimate, exact trace) of every layer's Hessian block."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)).eval()
    for parameter in net.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        )
    x = torch.randn(256, 20, generator=generator)
    batches = [(x, torch.randint(0, 10, (256,), generator=generator))]

    traces = hk.layer_traces(net, hk.cross_entropy(), batches, relative_error=relative_error)
    H = hk.hessian(net, hk.cross_entropy(), batches)
    found = {
        layer: (trace, float(H.block(f"{layer}.weight").dense().trace()))
        for layer, trace in traces.items()
    }
    print(f"{'layer':5}  {'Hutchinson':>16}  {'exact':>7}  probes  method")
    for layer, (trace, exact) in found.items():
        value = f"{trace.value:.4f} ± {trace.stderr:.4f}"
        print(f"{layer:5}  {value:>16}  {exact:7.4f}  {trace.samples:6}  {trace.method}")
    return found


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
