"""The narrow waist: a symmetric matrix known by its products alone.

Estimators know no model and operators know no estimator; both know this file. Letters in shapes:
n dimensions of the operator, k vectors.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from hawqkit.errors import InputError, NumericalError, did_you_mean

WHOLE = "all"  # the single block of an operator that has no named parameters


class SymmetricOperator(abc.ABC):
    """A real symmetric matrix A of n rows, given by `v -> A v`.

    Laws that the tests check for every operator: `matvec` is linear, `u'(A v) = v'(A u)`, `matmat`
        is
    `matvec` column by column, and `block(*names)` is the principal submatrix of those blocks.

    A subclass gives `_matvec`, and `_matmat` where several products together are cheaper.

    Attributes:
        size: n.
        device: where vectors live; others are moved.
        dtype: of vectors; others are converted.
        blocks: name -> its place in the flat vector, in order; they cover 0 to n.
        notes: what a record should say about the products: a fallback, half precision, a zero
            block.
    """

    def __init__(
        self,
        size: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        blocks: Mapping[str, slice] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        if size < 1:
            raise InputError(f"an operator needs at least one dimension; got {size}.")
        self.size, self.device, self.dtype = size, torch.device(device), dtype
        self.blocks: Mapping[str, slice] = MappingProxyType(
            dict(blocks) if blocks is not None else {WHOLE: slice(0, size)}
        )
        self._notes = notes
        self._products = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What a record should say about the products."""
        return self._notes

    @property
    def products(self) -> int:
        """How many vectors this operator has been multiplied with so far."""
        return self._products

    def matvec(self, v: Tensor) -> Tensor:
        """Return A v, (n,), in the operator's dtype and on its device.

        Args:
            v: (n,).

        Raises:
            InputError: the vector has another shape.
            NumericalError: the product holds NaN or infinity.
        """
        if v.shape != (self.size,):
            raise InputError(
                f"matvec: the operator has {self.size} dimensions, so it takes a vector of shape "
                f"({self.size},); got {tuple(v.shape)}."
            )
        self._products += 1
        product = self._matvec(v.detach().to(self.device, self.dtype))
        self._refuse_nonfinite(product)
        return product

    def matmat(self, V: Tensor) -> Tensor:
        """Return A V, (n, k): k products, together where that is cheaper.

        Args:
            V: (n, k).

        Raises:
            InputError: the matrix has another number of rows.
            NumericalError: a product holds NaN or infinity.
        """
        if V.ndim != 2 or V.shape[0] != self.size:
            raise InputError(
                f"matmat: the operator has {self.size} dimensions, so it takes a matrix of shape "
                f"({self.size}, k); got {tuple(V.shape)}."
            )
        self._products += V.shape[1]
        V = V.detach().to(self.device, self.dtype)
        products = self._matmat(V) if V.shape[1] else V.clone()
        self._refuse_nonfinite(products)
        return products

    def block(self, *names: str) -> SymmetricOperator:
        """Return the principal submatrix of some blocks, in the order of `blocks`.

        Args:
            names: keys of `blocks`.

        Raises:
            InputError: a name is unknown, or none is given.
        """
        return BlockOperator(self, self._known(names))

    @abc.abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:
        """Return A v for v in this operator's dtype and on its device."""

    def _matmat(self, V: Tensor) -> Tensor:
        return torch.stack([self._matvec(V[:, j].contiguous()) for j in range(V.shape[1])], 1)

    def __matmul__(self, other: Tensor) -> Tensor:
        """Return `matvec` of a vector, `matmat` of a matrix."""
        return self.matvec(other) if other.ndim == 1 else self.matmat(other)

    def dense(self) -> Tensor:
        """Return A as a matrix, (n, n), by n products: for small operators and for tests."""
        return self.matmat(torch.eye(self.size, dtype=self.dtype, device=self.device))

    def asymmetry(self, *, pairs: int = 3, seed: int = 0) -> float:
        """Estimate |A - A'|_F / |A|_F from products with random pairs u, v.

        With independent standard normal u and v, `E (u'A v - v'A u)^2 = |A - A'|_F^2` and
        `E |A v|^2 = |A|_F^2`; the estimate is the root of the ratio of the two means. Zero for an
        operator whose products are all zero.

        Args:
            pairs: how many; each costs two products.
            seed: of u and v.
        """
        generator = torch.Generator().manual_seed(seed)
        U, V = (
            torch.randn(self.size, pairs, generator=generator, dtype=torch.float64) for _ in "uv"
        )
        AU, AV = (self.matmat(X).to("cpu", torch.float64) for X in (U, V))
        difference = float((((U * AV).sum(0) - (V * AU).sum(0)) ** 2).mean())
        scale = float(((AU**2).sum(0).mean() + (AV**2).sum(0).mean()) / 2)
        return (difference / scale) ** 0.5 if scale > 0 else 0.0

    def check_symmetric(self, tolerance: float | None = None, *, seed: int = 0) -> float:
        """Return the asymmetry, or refuse an operator that is not symmetric.

        Args:
            tolerance: largest `asymmetry` allowed; None gives eps^0.4 of the dtype, which leaves
                the rounding of deep models room: 5e-7 in float64, 2e-3 in float32.
            seed: of the random pairs.

        Raises:
            NumericalError: the asymmetry is larger; the message tells it.
        """
        found = self.asymmetry(seed=seed)
        tolerance = torch.finfo(self.dtype).eps ** 0.4 if tolerance is None else tolerance
        if found > tolerance:
            raise NumericalError(
                f"the operator is not symmetric: |A - A'| is about {found:.1e} of |A|, allowed is "
                f"{tolerance:.1e}. Eigenvalues and traces of it would mean little; give a "
                "symmetric operator, or (A + A')/2."
            )
        return found

    def _known(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Check names of blocks and return them in the order of `blocks`, each once."""
        for name in names:
            if name not in self.blocks:
                raise InputError(
                    f"the operator has no block {name!r}; it has {len(self.blocks)}, named like "
                    f"{next(iter(self.blocks))!r}." + did_you_mean(name, list(self.blocks))
                )
        if not names:
            raise InputError("block: give the name of one block or more.")
        return tuple(name for name in self.blocks if name in names)

    def _refuse_nonfinite(self, product: Tensor) -> None:
        if all_finite(product):
            return
        bad = ~torch.isfinite(product)
        rows = bad if bad.ndim == 1 else bad.any(1)
        first = int(rows.nonzero()[0, 0])
        name = next(n for n, place in self.blocks.items() if place.start <= first < place.stop)
        raise NumericalError(
            f"a product of the operator holds NaN or infinity: {int(bad.sum())} numbers, the first "
            f"in block {name!r} at place {first}. Check the vector that it was multiplied with, "
            "and the operator."
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinity, by one pass where none is."""
    total = tensor.sum()  # NaN and infinity reach it; a sum may also overflow by itself
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


class CallableOperator(SymmetricOperator):
    """An operator from a function `v (n,) -> A v (n,)`.

    >>> op = CallableOperator(lambda v: 2 * v, 3)
    >>> op.matvec(torch.ones(3)).tolist()
    [2.0, 2.0, 2.0]
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        size: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        blocks: Mapping[str, slice] | None = None,
    ) -> None:
        super().__init__(size, device=device, dtype=dtype, blocks=blocks)
        self._function = function

    def _matvec(self, v: Tensor) -> Tensor:
        product = self._function(v)
        if not isinstance(product, Tensor) or product.shape != v.shape:
            came = tuple(product.shape) if isinstance(product, Tensor) else type(product).__name__
            raise InputError(
                f"the operator's function must return a tensor of shape {tuple(v.shape)}, as its "
                f"argument has; it returned {came}."
            )
        return product.detach().to(self.device, self.dtype)


class MatrixOperator(SymmetricOperator):
    """An operator from a dense symmetric matrix, (n, n).

    >>> MatrixOperator(torch.diag(torch.tensor([1.0, 3.0]))).matvec(torch.ones(2)).tolist()
    [1.0, 3.0]
    """

    def __init__(self, matrix: Tensor, *, blocks: Mapping[str, slice] | None = None) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"an operator's matrix must be square; got {tuple(matrix.shape)}.")
        matrix = matrix.detach()
        matrix = matrix if matrix.is_floating_point() else matrix.double()
        super().__init__(matrix.shape[0], device=matrix.device, dtype=matrix.dtype, blocks=blocks)
        self._matrix = matrix

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matrix @ v

    def _matmat(self, V: Tensor) -> Tensor:
        return self._matrix @ V


class BlockOperator(SymmetricOperator):
    """The principal submatrix of some blocks of another operator: put in, multiply, cut out."""

    def __init__(self, whole: SymmetricOperator, names: tuple[str, ...]) -> None:
        self._places = [whole.blocks[name] for name in names]
        self._whole = whole
        blocks, start = {}, 0
        for name, place in zip(names, self._places, strict=True):
            blocks[name] = slice(start, start + place.stop - place.start)
            start = blocks[name].stop
        super().__init__(start, device=whole.device, dtype=whole.dtype, blocks=blocks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the whole operator says."""
        return self._whole.notes

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _matmat(self, V: Tensor) -> Tensor:
        padded = V.new_zeros(self._whole.size, V.shape[1])  # (N, k)
        for own, place in zip(self.blocks.values(), self._places, strict=True):
            padded[place] = V[own]
        product = self._whole.matmat(padded)
        return torch.cat([product[place] for place in self._places])


def as_operator(
    source: SymmetricOperator | Tensor | Callable[[Tensor], Tensor],
    size: int | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> SymmetricOperator:
    """Return an operator from an operator, a dense matrix, or a function with its size.

    Args:
        source: an operator, returned as it is; an (n, n) tensor; or a function v -> A v.
        size: n, for a function.
        device: of the function's vectors.
        dtype: of the function's vectors.

    Raises:
        InputError: a function comes without its size, a matrix is not square, or it is none of
            these.

    >>> as_operator(torch.eye(3)).size
    3
    """
    if isinstance(source, SymmetricOperator):
        return source
    if isinstance(source, Tensor):
        return MatrixOperator(source)
    if callable(source):
        if size is None:
            raise InputError(
                "a function does not tell its size; pass it too: "
                "CallableOperator(function, size, dtype=..., device=...)."
            )
        return CallableOperator(source, size, device=device, dtype=dtype)
    raise InputError(
        f"got {type(source).__name__}; an operator, a square tensor, or a function of vectors is "
        "needed."
    )
