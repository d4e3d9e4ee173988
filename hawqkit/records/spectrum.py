"""The spectrum of a network's curvature, whole and layer by layer: `spectrum.json`. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hawqkit.records.density import UNRESOLVED
from hawqkit.records.measured import DataFacts
from hawqkit.records.schema import SCHEMA
from hawqkit.records.spectral import Eigenvalues, Estimate, PowerLaw, Ranks, RankStatistics

WHOLE_NETWORK = "whole network"


@dataclass(frozen=True, slots=True)
class BlockSpectrum:
    """What was found of one diagonal block of the curvature matrix: a layer's, or all of it.

    Attributes:
        name: the layer's name, or `whole network`.
        block: the transformer block that the layer lies in, None outside of any.
        size: n, the parameters that the block is over.
        method: `dense`, all eigenvalues by a dense solver; or `lanczos quadrature`.
        top: eigenvalues of largest magnitude, with their residuals; None where none was asked for.
        ranks: numerical rank and degeneracy at each threshold, and the noise floor.
        statistics: trace, Frobenius norm and the four effective ranks; None where a single draw
            gives no error bar.
        smallest: the least eigenvalue in sight; the true one is at most that.
        products: matrix-vector products that were spent on all of it.
        notes: what a reader must know.
        power_law: fitted to the largest eigenvalues that are known one by one, at most 1,000; None
            where they are too few or do not fall.
    """

    name: str
    block: int | None
    size: int
    method: str
    top: Eigenvalues | None
    ranks: Ranks
    statistics: RankStatistics | None
    smallest: float
    products: int
    notes: tuple[str, ...] = ()
    power_law: PowerLaw | None = None

    @property
    def kind(self) -> str:
        """What the layer is in its block, such as `q_proj`."""
        return self.name.rpartition(".")[2]

    def resolves(self, column: int) -> bool:
        """Say whether the rank at a threshold is known, and not only bounded.

        A quadrature of few steps cannot tell where the eigenvalues near zero are: its bounds then
        leave more than a tenth of them open, and the standard error is that of the bounds.
        """
        return UNRESOLVED not in self.ranks.counts[column].note

    @property
    def largest(self) -> float:
        """The eigenvalue of largest magnitude, or the largest |node| of the quadrature."""
        return self.top.values[0] if self.top is not None else self.ranks.largest

    @property
    def largest_residual(self) -> float | None:
        """How far from it the truth may be; None where it is a node, a lower bound."""
        return self.top.residuals[0] if self.top is not None else None


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Density, top eigenvalues, rank and degeneracy: `spectrum.json`.

    Attributes:
        kind: `gauss-newton` or `hessian`.
        objective: name of the loss.
        blocks: of layers, in the model's order.
        whole: of the whole network, None where it was not asked for.
        traces: layer -> trace by which `top-N` chose, for every layer; empty without such a choice.
        settings: what was asked for.
        model: source of the model, and its hash.
        data: the text that the loss is over, None for batches of another kind.
        fingerprint: of everything that the record depends on.
        warnings: for a reader of the report.
        densities: name -> `Density` with raw tridiagonals, in `spectrum.safetensors`.
    """

    kind: str
    objective: str
    blocks: tuple[BlockSpectrum, ...]
    whole: BlockSpectrum | None
    traces: dict[str, Estimate]
    settings: dict[str, Any]
    model: str
    model_hash: str
    data: DataFacts | None
    fingerprint: str
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA
    densities: Any = field(default=None, repr=False, compare=False, metadata={"json": False})

    @property
    def everything(self) -> tuple[BlockSpectrum, ...]:
        """The whole network, if it was measured, and then the layers."""
        return (self.whole, *self.blocks) if self.whole is not None else self.blocks
