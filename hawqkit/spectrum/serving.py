"""Several processes behind one operator: the main process decides, all of them multiply.

An estimator runs in the main process alone, so that what it draws, keeps and resumes happens once.
Each product that it asks for goes to all processes, which multiply with their share of the batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hawqkit.curvature.operator import SymmetricOperator
from hawqkit.distributed import broadcast, gather, processes

Operators = Mapping[str, SymmetricOperator]


class ServedOperator(SymmetricOperator):
    """An operator of the main process whose products are made by all processes together."""

    def __init__(self, name: str, operator: SymmetricOperator) -> None:
        super().__init__(
            operator.size, device=operator.device, dtype=operator.dtype, blocks=operator.blocks
        )
        self._name, self._operator = name, operator

    @property
    def notes(self) -> tuple[str, ...]:
        """What the operator itself says."""
        return self._operator.notes

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _matmat(self, V: Tensor) -> Tensor:
        gather((self._name, V.shape[1]))
        return self._operator.matmat(broadcast(V.contiguous()))


@contextmanager
def served(operators: Operators) -> Iterator[Operators]:
    """Give the main process operators that all processes multiply; the others serve, and get none.

    Every process must come here with the same operators. The block's body runs in the others too,
    when the main process has left it; they find an empty mapping.

    Args:
        operators: name -> operator; with a single process they are given back as they are.
    """
    me = processes()
    if me.count == 1:
        yield operators
    elif me.is_main:
        try:
            yield {name: ServedOperator(name, op) for name, op in operators.items()}
        finally:
            gather(None)
    else:
        _serve(operators)
        yield {}


def _serve(operators: Operators) -> None:
    """Multiply what the main process sends until it says that there is no more."""
    while (order := gather(None)[0]) is not None:
        name, count = order
        operator = operators[name]
        V = torch.empty(operator.size, count, dtype=operator.dtype, device=operator.device)
        operator.matmat(broadcast(V))
