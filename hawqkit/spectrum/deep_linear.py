"""Exact ranks of deep linear networks: the formulas, and what is measured beside them.

Letters: L weight matrices W_l of shape (M_l, M_{l-1}), M_0 = d inputs, M_L = K outputs, M the sum
of the hidden widths, r the rank of E[x x'], s the rank of E[residual x'], n weights together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit.curvature.data import Batches, to_device
from hawqkit.curvature.gauss_newton import gauss_newton
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.objective import Objective, output_curvature, output_residual
from hawqkit.errors import InputError, Unsupported, did_you_mean
from hawqkit.estimators.ranks import DENSE_UP_TO

LOSSES = ("squared", "cross-entropy")
TOLERANCE = 1e-11
_LOSS_OF = {"squared error": "squared", "cross-entropy": "cross-entropy"}


@dataclass(frozen=True, slots=True)
class DeepLinearRanks:
    """What the formulas say.

    Attributes:
        gauss_newton: rank of G.
        functional: rank of H - G, the part that holds second derivatives of the network.
        hessian: rank of H.
        size: n.
        input_rank: r.
        residual_rank: s.
        q: the smallest of r, K (K - 1 with cross-entropy) and the hidden widths; at a global
            minimum the rank of the end-to-end matrix there.
        loss: `squared` or `cross-entropy`.
        at_minimum: which of the two sets of formulas.
    """

    gauss_newton: int
    functional: int
    hessian: int
    size: int
    input_rank: int
    residual_rank: int
    q: int
    loss: str
    at_minimum: bool

    @property
    def degeneracy(self) -> float:
        """1 - rank H / n."""
        return 1 - self.hessian / self.size


def deep_linear_ranks(
    widths: Sequence[int],
    *,
    input_rank: int | None = None,
    residual_rank: int | None = None,
    loss: str = "squared",
    end_to_end_rank: int | None = None,
) -> DeepLinearRanks:
    """Return the ranks of G, of H - G and of H for the network `W_L ... W_1 x` without biases.

    With q the smallest of r, K and the hidden widths, and q_s = min(q, s), for L >= 2:

        rank G       = q (r + K - q)
        rank (H - G) = 2 q_s M + 2 q_s s - L q_s^2
        rank H       = q (r + K - q) + 2 q_s M - (L - 1) q_s^2

    and for L = 1, where H = G, the first alone. With cross-entropy K - 1 stands for K: a common
    shift of all logits changes nothing, and the residuals of a prediction add up to zero. They hold
    for almost all weights: those where every product of neighboring matrices has the rank that the
    widths allow, as at random initialization.

    At a global minimum, with q the rank of the end-to-end matrix on the span of the inputs:

        rank H = rank G = q (r + K - q),    rank (H - G) = 2 q s

    There s <= min(r, K) - q, and s = 0 where q is below all hidden widths: only a width that is too
    small leaves a residual that inputs still explain. It holds if for some m the matrices
    `W_L ... W_{l+1}`, l <= m, and `W_{l-1} ... W_1`, l > m, have rank q too: always where a hidden
    width is q, and for the balanced weights, `W_{l+1}' W_{l+1} = W_l W_l'`, that gradient descent
    from small weights finds; and if, where s > 0, the minimum is unique as a matrix.

    Sources: Singh, Bachmann and Hofmann 2021, Analytic insights into structure and rank of neural
    network Hessian maps, for the formulas off the minimum; that at a minimum H is the pull-back of
    the loss on the smooth set of matrices of rank q, of dimension q (r + K - q), is differential
    geometry. Checked in exact arithmetic for depths 1 to 4 and all r and s.

    Args:
        widths: d, the hidden widths, K; two numbers or more.
        input_rank: r, of the uncentered second moment of the inputs; None gives d.
        residual_rank: s, of `E[(z - y) x']`, or `E[(p - e_y) x']` with cross-entropy; None gives
            the largest there is.
        loss: `squared` or `cross-entropy`.
        end_to_end_rank: at a global minimum, the rank of `W_L ... W_1` on the span of the inputs,
            with cross-entropy after the mean of its rows is taken from each; None elsewhere.

    Raises:
        InputError: a width or rank that cannot be, or an unknown loss.

    >>> found = deep_linear_ranks([25, 5, 10, 10])
    >>> found.gauss_newton, found.functional, found.hessian
    (150, 175, 250)
    """
    M = _checked_widths(widths, loss)
    depth, hidden = len(M) - 1, M[1:-1]
    K = M[-1] - 1 if loss == "cross-entropy" else M[-1]
    r = _checked("input_rank", input_rank, M[0], default=M[0])
    q = min(r, K, *hidden)
    at_minimum = end_to_end_rank is not None
    if at_minimum:
        widest, q = q, _checked("end_to_end_rank", end_to_end_rank, q, default=q)
        most = min(r, K) - q if q == widest else 0
    else:
        most = min(r, K)
    s = _checked("residual_rank", residual_rank, most, default=most)
    outer = q * (r + K - q)
    if at_minimum:
        functional, whole = 2 * q * s, outer
    else:
        q_s, total = min(q, s), sum(hidden)
        functional = 2 * q_s * total + 2 * q_s * s - depth * q_s**2 if depth > 1 else 0
        whole = outer + 2 * q_s * total - (depth - 1) * q_s**2
    size = sum(a * b for a, b in zip(M[1:], M[:-1], strict=True))
    return DeepLinearRanks(outer, functional, whole, size, r, s, q, loss, at_minimum)


def _checked_widths(widths: Sequence[int], loss: str) -> list[int]:
    if loss not in LOSSES:
        raise InputError(
            f"loss: got {loss!r}; allowed are {', '.join(LOSSES)}." + did_you_mean(loss, LOSSES)
        )
    M = [int(width) for width in widths]
    if len(M) < 2 or min(M) < 1:
        raise InputError(
            f"widths: got {list(widths)}; give inputs, hidden widths and outputs, each 1 or more."
        )
    return M


def _checked(name: str, value: int | None, most: int, *, default: int) -> int:
    """Return a rank, or the default, if it is between 0 and `most`."""
    value = default if value is None else int(value)
    if not 0 <= value <= most:
        raise InputError(
            f"{name}: got {value}; with these widths and ranks it is between 0 and {most}."
        )
    return value


@dataclass(frozen=True, slots=True)
class MeasuredRanks:
    """What was counted, beside the formulas.

    Attributes:
        gauss_newton: singular values of G above `tolerance * largest`.
        functional: the same of H - G.
        hessian: the same of H.
        formula: for the widths and the measured ranks of inputs, residual and end-to-end matrix.
        largest: largest singular value of H, which all three are counted against.
        tolerance: on singular values over `largest`.
        smallest_kept: smallest singular value that was counted, of the three, over `largest`.
        largest_dropped: largest that was not, over `largest`. Far apart, the counts are clear.
        note: where the weights are not those that the formulas are for.
    """

    gauss_newton: int
    functional: int
    hessian: int
    formula: DeepLinearRanks
    largest: float
    tolerance: float
    smallest_kept: float
    largest_dropped: float
    note: str = ""

    @property
    def agree(self) -> bool:
        """Whether all three counts are those of the formulas."""
        f = self.formula
        counted = (self.gauss_newton, self.functional, self.hessian)
        return counted == (f.gauss_newton, f.functional, f.hessian)


def measure_deep_linear_ranks(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Any],
    *,
    loss: str | None = None,
    at_minimum: bool = False,
    tolerance: float = TOLERANCE,
) -> MeasuredRanks:
    """Count the ranks of G, H - G and H of a deep linear network densely, beside the formulas.

    Args:
        model: `nn.Linear` layers without biases, one after another in `nn.Sequential`, in float64
            and eval mode. `nn.Identity` and `nn.Flatten` may stand between.
        objective: the loss.
        batches: pairs (inputs, targets).
        loss: which formulas; None goes by the objective, which must then be `cross_entropy()` or
            `squared_error()`. An objective of one's own with softmax cross-entropy of other targets
            says `cross-entropy`.
        at_minimum: whether the weights are a global minimum.
        tolerance: singular values above `tolerance * largest of H` count; those of the second
            moments count against their own scale.

    Raises:
        InputError: another objective with `loss=None`.
        Unsupported: the model is no such network, not in float64, or has more than 2,048 weights.
    """
    weights = _chain(model)
    if loss is None and objective.name not in _LOSS_OF:
        raise InputError(
            f"loss: the objective is {objective.name!r}; say which formulas it belongs to, "
            f"loss={' or loss='.join(map(repr, LOSSES))}."
        )
    loss = loss if loss is not None else _LOSS_OF[objective.name]
    chosen = list(model.parameters())
    outer_part = gauss_newton(model, objective, batches, parameters=chosen)
    moments = _Moments(model, objective, Batches(batches), weights[0])
    formula, note = _formula(weights, moments, loss, at_minimum, tolerance)
    G, H = outer_part.dense(), hessian(model, objective, batches, parameters=chosen).dense()
    spectra = [torch.linalg.eigvalsh((A + A.T) / 2).abs() for A in (G, H - G, H)]
    largest = float(spectra[2].max())
    relative = [values / largest if largest > 0 else values for values in spectra]
    outer, functional, whole = (int((values > tolerance).sum()) for values in relative)
    together = torch.cat(relative)
    kept, dropped = together[together > tolerance], together[together <= tolerance]
    return MeasuredRanks(
        gauss_newton=outer,
        functional=functional,
        hessian=whole,
        formula=formula,
        largest=largest,
        tolerance=tolerance,
        smallest_kept=float(kept.min()) if len(kept) else 0.0,
        largest_dropped=float(dropped.max()) if len(dropped) else 0.0,
        note=note,
    )


def _chain(model: nn.Module) -> list[Tensor]:
    """Return W_1 to W_L of a network that is nothing but their product."""
    weights: list[Tensor] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Sequential, nn.Identity, nn.Flatten)):
            continue
        if type(module) is not nn.Linear or len(list(module.parameters())) > 1:
            kind = type(module).__name__
            raise Unsupported(
                f"the model holds {name!r}, a {kind + ' with a bias' * (kind == 'Linear')}; the "
                "formulas are for nn.Linear layers with bias=False in nn.Sequential. For other "
                "networks use rank()."
            )
        weights.append(module.weight)
    meet = all(b.shape[1] == a.shape[0] for a, b in pairwise(weights))
    if not weights or not meet or len({id(w) for w in weights}) < len(weights):
        raise Unsupported(
            "the model is no chain of nn.Linear layers, each with a weight of its own and feeding "
            "the next one."
        )
    if any(w.dtype != torch.float64 for w in weights):
        raise Unsupported(
            f"the model is in {weights[0].dtype}; ranks to {TOLERANCE:g} need float64: call "
            "model.double(), and give inputs in float64."
        )
    size = sum(w.numel() for w in weights)
    if size > DENSE_UP_TO:
        raise Unsupported(
            f"the model has {size:,} weights; ranks are counted densely up to {DENSE_UP_TO:,}. "
            "For larger networks use rank(), which estimates."
        )
    return [w.detach() for w in weights]


class _Moments:
    """E[x x'] and E[residual x'] over predictions that count, and their scales."""

    def __init__(
        self, model: nn.Module, objective: Objective, batches: Batches, first: Tensor
    ) -> None:
        seen: list[Tensor] = []
        layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
        hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        d = first.shape[1]
        self.inputs = first.new_zeros(d, d)
        self.cross: Tensor | None = None
        self.scale, self.count = 0.0, 0
        try:
            for _, _, batch in batches:
                seen.clear()
                batch = to_device(batch, first.device)
                with torch.no_grad():
                    z = objective.outputs(model, batch)
                self._add(objective, batch, seen[0], z)
        finally:
            hook.remove()

    def _add(self, objective: Objective, batch: Any, x: Tensor, z: Tensor) -> None:
        if x.shape[:-1] != z.shape[:-1]:
            raise Unsupported(
                f"inputs of shape {tuple(x.shape)} and outputs of shape {tuple(z.shape)}: the last "
                "axis of both must be that of one prediction."
            )
        K = z.shape[-1]
        rows = torch.eye(K, dtype=z.dtype, device=z.device).reshape(K, *([1] * (z.ndim - 1)), K)
        # Ignored labels have no curvature at the outputs, and so no part in G.
        curvature = output_curvature(objective, z, batch, rows.expand(K, *z.shape))
        counted = (curvature != 0).any(0).any(-1).flatten()
        residual = output_residual(objective, z, batch).reshape(-1, K)
        x, z = x.reshape(-1, x.shape[-1])[counted], z.reshape(-1, K)[counted]
        self.inputs += x.T @ x
        added = residual[counted].T @ x
        self.cross = added if self.cross is None else self.cross + added
        # The residual is a difference of numbers of this size, and so is its rounding.
        size = z.norm(dim=-1) + residual[counted].norm(dim=-1) + 1
        self.scale += float((size * x.norm(dim=-1)).sum())
        self.count += int(counted.sum())


def _formula(
    weights: list[Tensor], moments: _Moments, loss: str, at_minimum: bool, tolerance: float
) -> tuple[DeepLinearRanks, str]:
    """Return the formulas for the measured r, s and q, and what the weights lack for them."""
    values, vectors = torch.linalg.eigh(moments.inputs)
    span = values > tolerance * values.max()
    root = vectors[:, span] * values[span].sqrt()  # (d, r)
    assert moments.cross is not None
    s = int((torch.linalg.svdvals(moments.cross) > tolerance * moments.scale).sum())
    widths = [weights[0].shape[1], *(w.shape[0] for w in weights)]
    last = weights[-1] - weights[-1].mean(0) if loss == "cross-entropy" else weights[-1]
    chain = [root, *weights[:-1], last]
    # ranks[i][j] is that of the product of chain[i] to chain[j], the last of them on the left.
    ranks = [_running_ranks(chain[i:], tolerance) for i in range(len(chain))]
    r = root.shape[1]
    formula = deep_linear_ranks(
        widths,
        input_rank=r,
        residual_rank=s,
        loss=loss,
        end_to_end_rank=ranks[0][-1] if at_minimum else None,
    )
    sizes = [r, *widths[:-1], widths[-1] - (loss == "cross-entropy")]
    missing = _unlike_a_minimum if at_minimum else _unlike_almost_all
    return formula, missing(ranks, sizes, formula.q)


def _running_ranks(chain: list[Tensor], tolerance: float) -> list[int]:
    """Return the ranks of chain[0], chain[1] chain[0], and so on."""
    product, ranks = chain[0], []
    for j, factor in enumerate(chain):
        product = factor @ product if j else product
        values = torch.linalg.svdvals(product)
        ranks.append(int((values > tolerance * values.max()).sum()) if values.numel() else 0)
    return ranks


def _unlike_almost_all(ranks: list[list[int]], sizes: list[int], q: int) -> str:
    """Say which product of neighbors has a lower rank than its widths allow."""
    for i, row in enumerate(ranks):
        if i == 1:  # what W_1 does outside the span of the inputs is never seen
            continue
        for j, found in enumerate(row):
            most = min(sizes[i : i + j + 2])
            if found < most:
                name = "inputs" if i == j == 0 else f"W_{max(i, 1)} to W_{i + j}"
                return f"the product of {name} has rank {found}, and the formulas are for {most}"
    return ""


def _unlike_a_minimum(ranks: list[list[int]], sizes: list[int], q: int) -> str:
    """Say whether hidden layers hold more than the end-to-end matrix needs."""
    depth = len(ranks) - 1
    behind = ranks[0][:depth]  # W_{l-1} ... W_1 on the inputs, l = 1 to L
    ahead = [*(ranks[i][-1] for i in range(2, depth + 1)), sizes[-1]]  # W_L ... W_{l+1}
    for m in range(depth + 1):
        if all(a == q for a in ahead[:m]) and all(b == q for b in behind[m:]):
            return ""
    return (
        f"the end-to-end matrix has rank {q}, but products of some weights before and after the "
        "same place have more, and the formulas are for neither"
    )
