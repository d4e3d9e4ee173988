"""Signs of life from a long measurement: products made so far, in the log."""

from __future__ import annotations

import logging
import time

from torch import Tensor

from hawqkit.curvature.operator import SymmetricOperator

EVERY = 30.0  # seconds between two lines

_LOG = logging.getLogger(__name__)


class WatchedOperator(SymmetricOperator):
    """An operator that logs, at most every 30 seconds, how many products it has made."""

    def __init__(self, name: str, operator: SymmetricOperator) -> None:
        super().__init__(
            operator.size, device=operator.device, dtype=operator.dtype, blocks=operator.blocks
        )
        self._name, self._operator = name, operator
        self._began = self._told = time.monotonic()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the operator itself says."""
        return self._operator.notes

    def _matvec(self, v: Tensor) -> Tensor:
        product = self._operator.matvec(v)
        self._tell()
        return product

    def _matmat(self, V: Tensor) -> Tensor:
        products = self._operator.matmat(V)
        self._tell()
        return products

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= EVERY:
            self._told = now
            _LOG.info(
                "spectrum of %s: %d products in %.0f s",
                self._name,
                self.products,
                now - self._began,
            )
