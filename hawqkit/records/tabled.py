"""Records of what is chosen from a table of scores that someone else made."""

from __future__ import annotations

from dataclasses import dataclass

from hawqkit.records.decided import Certificate
from hawqkit.records.schema import SCHEMA


@dataclass(frozen=True, slots=True)
class Taken:
    """What the chosen mix takes of one column, and what there is to choose between.

    Attributes:
        limit: as asked, None where the column was not limited.
        taken: by the chosen mix, in the column's unit.
        least: of the mix that takes least.
        most: of the mix that takes most.
    """

    limit: float | None
    taken: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class TradePoint:
    """The best score of what takes at most `taken`; it is proven to lie in [bound, score]."""

    taken: float
    score: float
    bound: float


@dataclass(frozen=True, slots=True)
class Trade:
    """One budget against the summed score: vertices of the lower convex hull.

    Attributes:
        budget: what is traded.
        points: by what they take, ascending.
        uniform: format -> every layer in it, where every layer can take it.
        chosen: the chosen mix, which other budgets and the limit itself may keep off the hull.
    """

    budget: str
    points: tuple[TradePoint, ...]
    uniform: dict[str, TradePoint]
    chosen: TradePoint


@dataclass(frozen=True, slots=True)
class TableAllocation:
    """What `hawqkit allocate TABLE` writes.

    Attributes:
        layers: layer name -> format name, in the order of the table.
        budgets: name -> limit, as asked.
        taken: column -> what the mix takes, for every column of costs.
        scores: layer name -> its score in that format, in the unit of the table.
        objective: their sum.
        certificate: proof that no mix within the budgets has a score below `bound`.
        frontier: the score against the first budget.
        groups: key -> layers that share a format.
        formats: in the order of the table.
        table: the file, as it was named.
        table_hash: SHA-256 of its bytes.
    """

    layers: dict[str, str]
    budgets: dict[str, float]
    taken: dict[str, Taken]
    scores: dict[str, float]
    objective: float
    certificate: Certificate
    frontier: Trade
    groups: dict[str, tuple[str, ...]]
    formats: tuple[str, ...]
    table: str
    table_hash: str
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA
