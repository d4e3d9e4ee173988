"""What a back-end is given and what it gives: the products of one batch, as sums.

Letters in shapes: n parameters, k vectors, r rows that a back-end keeps until the data is summed.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit.costs import available_bytes
from hawqkit.curvature.objective import Objective
from hawqkit.curvature.parameters import Parameters

# (outputs z, batch, index of its first example, U (k, *z.shape)) -> M U, for J' M J.
Factor = Callable[[Tensor, Any, int, Tensor], Tensor]

# A product with a vector holds about this many times what a forward pass keeps for its backward
# pass: measured 2.2 to 3.4 on convolutional and transformer networks.
BYTES_PER_SAVED = 4

# Bytes kept by the forward pass of copies that are handled together: up to here a copy costs the
# less the more of them there are; beyond, processors' caches no longer help. Measured on CPUs.
BYTES_OF_COPIES = 2**27


@dataclass(frozen=True, slots=True)
class Problem:
    """A loss to be differentiated twice.

    Attributes:
        module: the model.
        objective: its loss.
        parameters: by what.
        factor: M of a matrix J' M J, with J the Jacobian of the outputs; None for the Hessian.
        memory_bytes: what several products together may take; None is half of what is free.
        within: the parameters of the operator that this one is a block of, where graphs of its
            gradient are kept and shared; None is `parameters`.
    """

    module: nn.Module
    objective: Objective
    parameters: Parameters
    factor: Factor | None = None
    memory_bytes: int | None = None
    within: Parameters | None = None

    @property
    def wanted(self) -> Parameters:
        """The parameters that must want gradients in a pass."""
        return self.within if self.within is not None else self.parameters

    def restricted(self, names: Iterable[str], *, shared: bool) -> Problem:
        """Return the problem of some parameters; `shared` where gradients of all are kept."""
        within = self.wanted if shared else None
        return replace(self, parameters=self.parameters.only(names), within=within)

    def vectors_at_once(self, batch: Any, wanted: int) -> int:
        """Return how many products of a batch fit the memory limit together, at least one."""
        if wanted == 1:
            return 1
        each = BYTES_PER_SAVED * self._saved_bytes(batch)
        each += 2 * sum(t.nbytes for t in self.parameters.tensors)
        return max(1, min(wanted, self._limit() // max(1, each)))

    def copies_at_once(self, batch: Any, wanted: int) -> int:
        """Return how many copies of a batch are put into one pass, at least one."""
        saved = max(1, self._saved_bytes(batch))
        fitting = self._limit() // (BYTES_PER_SAVED * saved)
        return max(1, min(wanted, fitting, BYTES_OF_COPIES // saved))

    def _limit(self) -> int:
        if self.memory_bytes is not None:
            return self.memory_bytes
        return available_bytes(str(self.parameters.device)) // 2

    def _saved_bytes(self, batch: Any) -> int:
        """Return the bytes that one forward pass keeps for its backward pass."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            z = self.objective.outputs(self.module, batch)
            self.objective.loss(z, batch)
        weights = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        return sum(size for place, size in kept.items() if place not in weights)


@dataclass(frozen=True, slots=True)
class Sums:
    """What one batch adds to the sums over the data.

    Attributes:
        products: (r, n, k).
        loss: summed loss.
        count: counted predictions.
        independent: parameters that the batch's loss does not depend on.
        looped: why several vectors were multiplied one by one, empty where they were not.
        scale: what rounding errors of the products are proportional to, where `finish` asks for it.
    """

    products: Tensor
    loss: float
    count: float
    independent: frozenset[str] = frozenset()
    looped: str = ""
    scale: float = 0.0


class Backend(abc.ABC):
    """One way to make products; without state that outlives a change of the weights.

    Attributes:
        name: as the user asks for it.
        rows: r.
        twice: whether it differentiates through attention twice.
        keeps: whether it keeps graphs between products, of the problem's `within`.
    """

    name: str
    rows: int = 1
    twice: bool = True
    keeps: bool = False

    @abc.abstractmethod
    def batch(self, problem: Problem, number: int, example: int, batch: Any, V: Tensor) -> Sums:
        """Return a batch's sums of products with V (n, k).

        Args:
            problem: what is differentiated.
            number: of the batch.
            example: index of its first example.
            batch: on the device of the parameters.
            V: (n, k).
        """

    def finish(self, problem: Problem, means: Tensor, V: Tensor, scale: float) -> Tensor:
        """Return products (n, k) from means over the data: (r, n, k), and of `scale`."""
        return means[0]

    def again(self) -> bool:
        """After `finish` refused: whether the product is to be made once more, in another way."""
        return False


def parts(V: Tensor, size: int) -> Iterator[Tensor]:
    """Yield V (n, k) a few columns at a time."""
    for start in range(0, V.shape[1], size):
        yield V[:, start : start + size]


def beside(products: Sequence[Tensor]) -> Tensor:
    """Put the products of several parts side by side, (n, k), without a copy if there is one."""
    return products[0] if len(products) == 1 else torch.cat(list(products), 1)


def independent(parameters: Parameters, gradients: Sequence[Tensor | None]) -> frozenset[str]:
    """Return the names of the parameters whose gradient does not exist."""
    return frozenset(n for n, g in zip(parameters.names, gradients, strict=True) if g is None)
