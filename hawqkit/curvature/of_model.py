"""The operator over a model's parameters: sums over batches and processes, divided once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit.curvature.data import Batches, to_device
from hawqkit.curvature.objective import Objective
from hawqkit.curvature.operator import SymmetricOperator, all_finite
from hawqkit.curvature.parameters import Parameters
from hawqkit.curvature.passes import attention_note, differentiable, refuse_training_mode
from hawqkit.curvature.products.contract import Backend, Problem, Sums
from hawqkit.distributed import gather, processes, reduce_sum
from hawqkit.errors import (
    DataError,
    HawqkitError,
    InputError,
    NumericalError,
    Unsupported,
    did_you_mean,
)

AUTO = "auto"
REASONS = {
    "autograd": "every operator of the model has a second derivative; fastest of the exact ones",
    "forward": "exact, and every operator has a forward derivative",
    "difference": "first derivatives alone, at three steps that agree to one percent",
}

Table = Mapping[str, Callable[[], Backend]]


class ModelOperator(SymmetricOperator):
    """A matrix of second derivatives of a model's mean loss, by products with vectors.

    Made by `hessian`, `gauss_newton`, `fisher` and `empirical_fisher`. Every product is of the
    weights as they are at that moment. Between products the model is as it was found.

    Args:
        problem: what is differentiated.
        batches: the data.
        backends: name -> maker of a back-end, in the order in which `auto` tries them.
        products: a key of `backends`, or `auto`.
        kind: what the matrix is, for messages.
        keeps: whether a back-end may keep graphs, which blocks then share.
    """

    def __init__(
        self,
        problem: Problem,
        batches: Batches,
        backends: Table,
        products: str,
        kind: str,
        *,
        keeps: bool = False,
    ) -> None:
        if products not in (AUTO, *backends):
            allowed = (AUTO, *backends)
            raise InputError(
                f"products: got {products!r}; allowed are {', '.join(allowed)}."
                + did_you_mean(products, allowed)
            )
        refuse_training_mode(problem.module)
        parameters = problem.parameters
        super().__init__(
            parameters.size,
            device=parameters.device,
            dtype=parameters.dtype,
            blocks=parameters.blocks,
            notes=parameters.notes,
        )
        self.kind = kind
        self._problem, self._batches, self._table = problem, batches, backends
        self._asked, self._keeps = products, keeps
        self._backend: Backend | None = None
        self._reason = ""
        self._independent: frozenset[str] = frozenset()
        self._looped = ""

    @property
    def backend(self) -> str:
        """How products are made; with `auto` it is found by a product of the first batch."""
        return self._chosen().name

    @property
    def backend_reason(self) -> str:
        """Why this back-end, why not those before it, and why vectors are looped over, if so."""
        self._chosen()
        if not self._looped:
            return self._reason
        return f"{self._reason}; vectors one by one or slowly: {self._looped}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a record should say about the products made so far."""
        notes = list(self._notes)
        if self._independent:
            names = sorted(self._independent)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            notes.append(
                f"the loss does not depend on {', '.join(names[:3])}{more}: zero rows and columns."
            )
        if self._backend is not None and self._backend.twice:
            attention = attention_note(self._problem.module)
            notes += [attention] if attention else []
        if self._keeps and self._backend is not None and not self._backend.keeps:
            notes.append(f"no graph is kept: products are made by {self._backend.name}.")
        if self._looped:
            notes.append(f"vectors were multiplied one by one or slowly: {self._looped}")
        return tuple(notes)

    def block(self, *names: str) -> ModelOperator:
        """Return the principal submatrix of some parameters, differentiating by those alone.

        It shares the batches, and graphs that are kept.
        """
        keeps = self._chosen().keeps if self._keeps else False
        problem = self._problem.restricted(self._known(names), shared=keeps)
        made = ModelOperator(
            problem, self._batches, self._table, self._asked, self.kind, keeps=self._keeps
        )
        made._backend, made._reason = self._backend, self._reason
        return made

    def named(self, v: Tensor) -> dict[str, Tensor]:
        """Return a vector (n,) as parameter name -> tensor of its shape."""
        if v.shape != (self.size,):
            raise InputError(f"named: got shape {tuple(v.shape)}; it must be ({self.size},).")
        return self._problem.parameters.named(v)

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _matmat(self, V: Tensor) -> Tensor:
        refuse_training_mode(self._problem.module)
        while True:
            means, noise = self._means(V)
            backend = self._chosen()
            try:
                return backend.finish(self._problem, means, V, noise)
            except NumericalError:
                # All processes have the same means, so all of them come to the same end.
                if not backend.again():
                    raise

    def _means(self, V: Tensor) -> tuple[Tensor, float]:
        """Return products over all data and processes (r, n, k), and what their rounding is."""
        settling = self._backend is None
        totals, scalars, unused = self._local(V)
        me = processes()
        if me.count > 1:
            if settling and self._agree():
                totals, scalars, unused = self._local(V)
            totals = reduce_sum(totals)
            scalars = reduce_sum(scalars.to(self.device)).cpu()
            known = [s for s in gather(unused) if s is not None]
            unused = set.intersection(*known) if known else None
        count = float(scalars[1])
        if count == 0:
            raise DataError(
                "no prediction counts in any batch (all labels are ignored), so the mean loss is "
                "not defined; check the labels."
            )
        self._independent = frozenset(unused or ())
        return totals.div_(count), float(scalars[2]) / count

    def _local(self, V: Tensor) -> tuple[Tensor, Tensor, set[str] | None]:
        """Return this process's sums: products (r, n, k), scalars, parameters without use."""
        totals: Tensor | None = None
        scalars = torch.zeros(3, dtype=torch.float64)
        unused: set[str] | None = None
        for number, example, batch in processes().mine(self._batches):
            sums = self._one(number, example, to_device(batch, self.device), V)
            totals = sums.products if totals is None else totals.add_(sums.products)
            scalars += torch.tensor([sums.loss, sums.count, sums.scale], dtype=torch.float64)
            unused = set(sums.independent) if unused is None else unused & sums.independent
            self._looped = self._looped or sums.looped
        if totals is None:  # more processes than batches
            rows = self._backend.rows if self._backend is not None else 1
            totals = V.new_zeros(rows, *V.shape)
        return totals, scalars, unused

    def _one(self, number: int, example: int, batch: Any, V: Tensor) -> Sums:
        if self._backend is None:
            return self._first_that_works(number, example, batch, V)
        return self._try(self._backend, number, example, batch, V)

    def _try(self, backend: Backend, number: int, example: int, batch: Any, V: Tensor) -> Sums:
        with differentiable(self._problem.module, self._problem.wanted, twice=backend.twice):
            sums = backend.batch(self._problem, number, example, batch, V)
        self._refuse(sums, number)
        return sums

    def _refuse(self, sums: Sums, number: int) -> None:
        """Name the batch and the parameter of a product that is not finite."""
        if not torch.isfinite(torch.tensor(sums.loss)):
            raise NumericalError(
                f"the loss of batch {number} (counted from 0) is {sums.loss}; check its inputs and "
                "labels, or run the model in float32 if half precision overflows."
            )
        if all_finite(sums.products):
            return
        finite = torch.isfinite(sums.products).all(2).all(0)  # (n,)
        bad = [n for n, place in self.blocks.items() if not bool(finite[place].all())]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NumericalError(
            f"a product with the {self.kind} holds NaN or infinity for parameter "
            f"{', '.join(map(repr, bad[:3]))}{more}, in batch {number} (counted from 0), while the "
            f"loss there is {sums.loss:.4g}. Operators whose value is finite can have infinite "
            "derivatives (the square root or norm at zero); so can half precision that overflows: "
            "try float32, or leave that batch or parameter out."
        )

    def _chosen(self) -> Backend:
        """Return the back-end; if no product was made yet, settle it on the first batch."""
        if self._backend is None:
            V = torch.ones(self.size, 1, dtype=self.dtype, device=self.device)
            item = next(iter(processes().mine(self._batches)), None)
            if item is not None:
                number, example, batch = item
                self._first_that_works(number, example, to_device(batch, self.device), V)
            if processes().count > 1:
                self._agree()
        if self._backend is None:
            self._settle(self._candidates()[0], [])
        assert self._backend is not None
        return self._backend

    def _candidates(self) -> list[str]:
        return [self._asked] if self._asked != AUTO else list(self._table)

    def _settle(self, name: str, refused: list[str]) -> None:
        self._backend = self._table[name]()
        asked = f"asked for: {name}"
        self._reason = asked if self._asked != AUTO else "; ".join([*refused, REASONS[name]])

    def _agree(self) -> bool:
        """Take the latest candidate that any process had to take; True if this one changes."""
        names = self._candidates()
        mine = names.index(self._backend.name) if self._backend is not None else 0
        latest = max(gather(mine))
        if self._backend is not None and latest == mine:
            return False
        self._settle(names[latest], ["another process could not use those before"])
        return True

    def _first_that_works(self, number: int, example: int, batch: Any, V: Tensor) -> Sums:
        """Settle the back-end by making a batch's products, which count."""
        first: Exception | None = None
        refused: list[str] = []
        for name in self._candidates():
            self._settle(name, refused)
            assert self._backend is not None
            backend, self._backend = self._backend, None  # stays open if an error ends this pass
            try:
                sums = self._try(backend, number, example, batch, V)
            except HawqkitError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                first = first or error
                refused.append(f"{name} is not possible: {str(error).splitlines()[0][:160]}")
                continue
            self._backend = backend
            return sums
        assert first is not None
        raise Unsupported(
            f"no product with the {self.kind} can be made: {'; '.join(refused)}. If the model "
            "cannot be differentiated twice, products='difference' needs first derivatives alone."
        ) from first


def refuse_unknown(model: Any) -> nn.Module:
    """Return the network of a module or a loaded model.

    Raises:
        InputError: it is neither.
    """
    module = getattr(model, "module", model) if not isinstance(model, nn.Module) else model
    if not isinstance(module, nn.Module):
        raise InputError(
            f"model: got {type(model).__name__}; give a torch.nn.Module, or what load_model gives."
        )
    return module


def make_operator(
    model: Any,
    objective: Objective,
    batches: Iterable[Any],
    parameters: Parameters,
    *,
    backends: Table,
    products: str,
    kind: str,
    factor: Any = None,
    memory_bytes: int | None = None,
    keeps: bool = False,
    ordered: bool = False,
) -> ModelOperator:
    """Put an operator together; the arguments are those of `hessian` and its like."""
    if not isinstance(objective, Objective):
        raise InputError(
            f"objective: got {type(objective).__name__}; give cross_entropy(), squared_error(), or "
            "Objective(outputs=..., loss=...), whose loss is a sum with its count."
        )
    problem = Problem(refuse_unknown(model), objective, parameters, factor, memory_bytes)
    data = Batches(batches, ordered=ordered)
    return ModelOperator(problem, data, backends, products, kind, keeps=keeps)
