"""The Gauss-Newton matrix of a classifier, cut into its parts by classes (Papyan 2020).

Letters: N counted predictions, i one of them, y its class, p its probabilities, C classes, n
parameters, c and c' two classes, c' never c.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hawqkit.costs import available_bytes
from hawqkit.curvature.data import Batches, to_device
from hawqkit.curvature.gauss_newton import JACOBIANS
from hawqkit.curvature.objective import Objective, output_curvature
from hawqkit.curvature.of_model import ModelOperator, make_operator, refuse_unknown
from hawqkit.curvature.operator import SymmetricOperator, all_finite
from hawqkit.curvature.parameters import choose_parameters
from hawqkit.curvature.passes import differentiable, refuse_training_mode
from hawqkit.curvature.products.autograd import multiply
from hawqkit.curvature.products.contract import Problem, parts
from hawqkit.distributed import processes, reduce_sum
from hawqkit.errors import DataError, NumericalError, Unsupported
from hawqkit.models.model import LoadedModel
from hawqkit.spectrum.softmax_sides import Sides, other_classes, same_class, softmax_sides

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ClassDecomposition:
    """G and its four parts, `G = G_class + G_cross + G_within + G_same`.

    Attributes:
        whole: G.
        class_part: of the C class means; rank at most C.
        cross_part: of the cross-class means around those; rank at most C (C - 2).
        within_part: of the predictions around the cross-class means.
        same_part: of each prediction's own class (c' = c).
        class_values: (C,) eigenvalues of `class_part` that can differ from zero, falling.
        cross_values: (C (C - 1),) the same of `cross_part`; C of them are zero.
        means: (n, C (C - 1)) columns `sqrt(w_cc') g_cc'`, in the order c = 0, c' = 1, 2, ...
        weights: (C, C) w_cc', the mean over predictions of p_c' where y = c; zeros for c' = c.
        examples: (C,) counted predictions of each class.
        backward_passes: J' products that the means cost.
    """

    whole: ModelOperator
    class_part: SymmetricOperator
    cross_part: SymmetricOperator
    within_part: SymmetricOperator
    same_part: ModelOperator
    class_values: Array
    cross_values: Array
    means: Tensor
    weights: Tensor
    examples: tuple[int, ...]
    backward_passes: int

    @property
    def classes(self) -> int:
        """C."""
        return len(self.examples)

    def parts(self) -> dict[str, SymmetricOperator]:
        """Return the four that add up to G, by name."""
        return {
            "class": self.class_part,
            "cross": self.cross_part,
            "within": self.within_part,
            "same": self.same_part,
        }


def class_decomposition(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    parameters: Iterable[str | nn.Parameter] | None = None,
    products: str = "auto",
    memory_bytes: int | None = None,
) -> ClassDecomposition:
    """Cut G of a classifier with softmax cross-entropy into parts by classes.

    With J_i the Jacobian of prediction i's logits and `g_ic' = J_i' (p_i - e_c')`,

        G        = 1/N sum_i sum_c' p_ic' g_ic' g_ic''
        G_same   = 1/N sum_i p_iy g_iy g_iy'
        g_cc'    = sum_{i in c} p_ic' g_ic' / (N w_cc'),   w_cc' = 1/N sum_{i in c} p_ic'
        G_within = 1/N sum_i sum_{c' != y} p_ic' (g_ic' - g_yc') (g_ic' - g_yc')'
        g_c      = sum_c' w_cc' g_cc' / w_c,               w_c = sum_c' w_cc'
        G_cross  = sum_{c != c'} w_cc' (g_cc' - g_c) (g_cc' - g_c)'
        G_class  = sum_c w_c g_c g_c'

    where y is the class of i, and i in c says y = c. Papyan finds the C outliers of trained
    networks in G_class, and a second, smaller group of C (C - 2) in G_cross. Classes of unequal
    size weigh by their predictions; one that the data lacks has weight zero. No Jacobian is stored:
    the products with G_same, and with the part for c' != y that G_within comes from, go through J v
    and J' u. Of the means C (C - 1) vectors are kept, which cost as many backward passes a batch:
    large batches are cheap.

    Source: Papyan 2020, Traces of class/cross-class structure pervade deep learning spectra.

    Args:
        model: a network in eval mode.
        objective: softmax cross-entropy with one label a prediction, such as `cross_entropy()`.
        batches: as for `hessian`.
        parameters: as for `hessian`.
        products: how `J v` is made, as for `gauss_newton`.
        memory_bytes: what the means, and what several products together, may take; None is half of
            what is free.

    Raises:
        DataError: no prediction counts.
        InputError: as for `hessian`.
        NumericalError: a gradient holds NaN or infinity.
        Unsupported: another loss, or means that do not fit the memory.

    >>> from hawqkit.curvature.objective import cross_entropy
    >>> net = nn.Linear(2, 3, bias=False).double().eval()
    >>> _ = nn.init.zeros_(net.weight)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double()
    >>> found = class_decomposition(net, cross_entropy(), [(x, torch.tensor([0, 1, 2]))])
    >>> {name: round(abs(float(part.dense().trace())), 4) for name, part in found.parts().items()}
    {'class': 0.1481, 'cross': 0.4444, 'within': 0.0, 'same': 0.2963}
    """
    chosen = choose_parameters(model, parameters)

    def operator(kind: str, factor: Any) -> ModelOperator:
        return make_operator(
            model,
            objective,
            batches,
            chosen,
            backends=JACOBIANS,
            products=products,
            kind=kind,
            factor=factor,
            memory_bytes=memory_bytes,
        )

    def same(z: Tensor, batch: Any, example: int, U: Tensor) -> Tensor:
        return same_class(softmax_sides(objective, z, batch), U).to(z.dtype)

    def other(z: Tensor, batch: Any, example: int, U: Tensor) -> Tensor:
        return other_classes(softmax_sides(objective, z, batch), U).to(z.dtype)

    def full(z: Tensor, batch: Any, example: int, U: Tensor) -> Tensor:
        return output_curvature(objective, z, batch, U)

    whole = operator("Gauss-Newton matrix", full)
    same_part = operator("Gauss-Newton matrix of c' = c", same)
    other_part = operator("Gauss-Newton matrix of c' other than c", other)
    module = refuse_unknown(model)
    problem = Problem(module, objective, chosen, memory_bytes=memory_bytes)
    sums = _Means(problem, Batches(batches))
    return _assemble(whole, same_part, other_part, sums)


class _Means:
    """Sums over the predictions of each class, by one pass over the data.

    Attributes:
        columns: (n, C, C) sums of `p_ic' g_ic'` by class and c'.
        weights: (C, C) sums of p_ic', float64.
        examples: (C,) counted predictions.
        count: N.
        passes: J' products.
    """

    def __init__(self, problem: Problem, batches: Batches) -> None:
        refuse_training_mode(problem.module)
        self._problem = problem
        self.passes = 0
        chosen = problem.parameters
        self._C = C = self._classes(to_device(batches.first(), chosen.device))
        self._refuse_too_large(C)
        self.columns = torch.zeros(chosen.size, C, C, dtype=chosen.dtype, device=chosen.device)
        facts = torch.zeros(C, C + 1, dtype=torch.float64, device=chosen.device)
        for number, _, batch in processes().mine(batches):
            facts += self._batch(number, to_device(batch, chosen.device))
        self.columns = reduce_sum(self.columns)
        facts = reduce_sum(facts)
        self.weights, self.examples = facts[:, :C], facts[:, C]
        self.count = int(self.examples.sum())
        if self.count == 0:
            raise DataError("no prediction counts in any batch, so there are no classes.")

    def _classes(self, batch: Any) -> int:
        with torch.no_grad():
            return int(self._problem.objective.outputs(self._problem.module, batch).shape[-1])

    def _refuse_too_large(self, C: int) -> None:
        chosen = self._problem.parameters
        limit = self._problem.memory_bytes
        if limit is None:
            limit = available_bytes(str(chosen.device)) // 2
        # The sums, the means, the means around those of the classes, and two copies on the way.
        needed = 5 * C * C * chosen.size * torch.empty(0, dtype=chosen.dtype).element_size()
        if needed > limit:
            raise Unsupported(
                f"{C} classes have {C * (C - 1)} cross-class means of {chosen.size:,} numbers, "
                f"which take {needed / 2**30:.1f} GiB; the limit is {limit / 2**30:.1f}. Choose "
                "fewer parameters (parameters=...), or give memory_bytes."
            )

    def _batch(self, number: int, batch: Any) -> Tensor:
        """Add a batch's J' products; return its sums of p_ic' and, last, its counts, (C, C + 1)."""
        problem, C = self._problem, self._C
        with differentiable(problem.module, problem.wanted, twice=False):
            z = problem.objective.outputs(problem.module, batch)
            sides = softmax_sides(problem.objective, z.detach(), batch)
            pairs = _present(sides, C)
            at_once = problem.vectors_at_once(batch, max(1, len(pairs)))
            for some in parts(pairs.T, at_once):
                self._add(z, sides, some, number)
        hot = sides.hot.reshape(-1, C).double()
        sums = hot.T @ sides.others.reshape(-1, C).double()
        return torch.cat([sums, hot.sum(0)[:, None]], 1)

    def _add(self, z: Tensor, sides: Sides, pairs: Tensor, number: int) -> None:
        """Add `J' (p_c' (p - e_c'))` over the predictions of class c, for pairs (2, k)."""
        own, other = pairs
        axes = (-1, *range(z.ndim - 1))  # the class to the front
        chance = (sides.hot.permute(axes)[own] * sides.p.permute(axes)[other]).unsqueeze(-1)
        unit = nn.functional.one_hot(other, self._C).to(sides.p)
        unit = unit.reshape(-1, *([1] * (z.ndim - 1)), self._C)
        cotangents = (chance * (sides.p - unit)).to(z.dtype)  # (k, B, ..., C)
        pieces, _ = multiply([z], list(self._problem.parameters.tensors), [cotangents])
        joined = self._problem.parameters.join(pieces, pairs.shape[1])
        if not all_finite(joined):
            raise NumericalError(
                f"the gradients of batch {number} (counted from 0) hold NaN or infinity, so there "
                "are no class means; check its inputs, or run the model in float32."
            )
        self.columns[:, own, other] += joined
        self.passes += pairs.shape[1]


def _present(sides: Sides, C: int) -> Tensor:
    """Return the pairs (c, c'), c' other than c, of the classes c in a batch, (pairs, 2)."""
    there = sides.hot.reshape(-1, C).any(0)
    different = ~torch.eye(C, dtype=torch.bool, device=there.device)
    return (there[:, None] & different).nonzero()


def _assemble(
    whole: ModelOperator, same: ModelOperator, other: ModelOperator, sums: _Means
) -> ClassDecomposition:
    """Turn sums into means, and means into operators and small spectra."""
    C, n, dtype = len(sums.examples), whole.size, whole.dtype
    w = sums.weights / sums.count  # (C, C), zeros on the diagonal
    w_class = w.sum(1)
    root = torch.where(w > 0, (sums.weights * sums.count).rsqrt(), 0.0)
    means = sums.columns * root.to(dtype)  # sqrt(w_cc') g_cc'
    # sqrt(w_c) g_c = sum over c' of sqrt(w_cc' / w_c) * sqrt(w_cc') g_cc'
    share = torch.where(w > 0, (w / w_class[:, None]).sqrt(), 0.0)  # (C, C)
    class_columns = torch.einsum("ncd,cd->nc", means, share.to(dtype))
    cross_columns = means - class_columns[:, :, None] * share.to(dtype)
    different = ~torch.eye(C, dtype=torch.bool, device=means.device)
    blocks = dict(whole.blocks)
    class_part = ColumnOperator(class_columns, blocks)
    cross_part = ColumnOperator(cross_columns[:, different], blocks)
    kept = means[:, different].reshape(n, -1)
    return ClassDecomposition(
        whole=whole,
        class_part=class_part,
        cross_part=cross_part,
        within_part=DifferenceOperator(other, kept),
        same_part=same,
        class_values=class_part.values(),
        cross_values=cross_part.values(),
        means=kept,
        weights=w,
        examples=tuple(int(x) for x in sums.examples.tolist()),
        backward_passes=sums.passes,
    )


class ColumnOperator(SymmetricOperator):
    """A A' for columns A, (n, m), m small."""

    def __init__(self, columns: Tensor, blocks: dict[str, slice]) -> None:
        super().__init__(len(columns), device=columns.device, dtype=columns.dtype, blocks=blocks)
        self.columns = columns

    def values(self) -> Array:
        """Return the m eigenvalues that can differ from zero, falling, from the Gram matrix A'A."""
        A = self.columns.double()
        values = torch.linalg.eigvalsh(A.T @ A).flip(0)
        return np.asarray(values.cpu().numpy())

    def _matvec(self, v: Tensor) -> Tensor:
        return self.columns @ (self.columns.T @ v)

    def _matmat(self, V: Tensor) -> Tensor:
        return self._matvec(V)


class DifferenceOperator(SymmetricOperator):
    """B - A A' for an operator B and columns A: second moments around the means."""

    def __init__(self, second: ModelOperator, columns: Tensor) -> None:
        blocks = dict(second.blocks)
        super().__init__(second.size, device=second.device, dtype=second.dtype, blocks=blocks)
        self._second, self._columns = second, columns

    @property
    def notes(self) -> tuple[str, ...]:
        """What the products with B say."""
        return self._second.notes

    def _matvec(self, v: Tensor) -> Tensor:
        return self._second.matvec(v) - self._columns @ (self._columns.T @ v)

    def _matmat(self, V: Tensor) -> Tensor:
        return self._second.matmat(V) - self._columns @ (self._columns.T @ V)
