"""The true Hessian of every layer, for the scores that want it: resumable and in parallel.

The text's first few sequences are dealt to shards. In each shard every layer's trace is estimated
by random signs, and its eigenvalue of largest magnitude by Lanczos; both cost products with the
layer's block, several gradients each. Results are kept a chunk of layers at a time.

Letters: D shards, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hawqkit import distributed
from hawqkit.curvature.layer_traces import layer_traces
from hawqkit.curvature.layers import layer_operators
from hawqkit.curvature.objective import cross_entropy
from hawqkit.curvature.operator import SymmetricOperator
from hawqkit.curvature.parameters import choose_parameters
from hawqkit.errors import DataError, InputError, Unsupported, did_you_mean
from hawqkit.estimators.eigenpairs import top_eigenpairs
from hawqkit.journal import Journal
from hawqkit.models.batch import Batch, Data
from hawqkit.models.batches import MicroBatch, Sequences
from hawqkit.models.model import LoadedModel
from hawqkit.records import Curvature, Floats, Layer, Table, to_table
from hawqkit.sensitivity.curvature_scores import CURVATURE_SCORES, HESSIAN_TRACE, TOP_EIGENVALUE
from hawqkit.store import Arrays, fingerprint

# Layers of a journal entry: they share one gradient graph, which costs little beside the products
# of several layers, and a killed run loses one entry at most.
CHUNK = 8
# What several products may take together. A constant, since the rounding of a product depends on
# how many are made at once, and a resumed run must give the same bits.
PRODUCT_BYTES = 2 << 30
BASIS_BYTES = 2 << 30  # of Lanczos vectors, but at least
FEWEST_VECTORS = 12  # of them, however large a layer is


@dataclass(frozen=True, slots=True)
class CurvatureSettings:
    """What the scores of the true Hessian may cost.

    Attributes:
        sequences: of those that choose, the first so many.
        length: tokens that each is cut to.
        shards: parts that they are dealt to, measured one by one; errors and deviations over text
            need two.
        relative_error: a layer is done in a shard where a trace's standard error, or an
            eigenvalue's residual, is this share of its magnitude.
        max_probes: random vectors after which a trace is done at the latest, in each shard. All
            shards' probes together make its error.
        max_products: products after which an eigenvalue is done at the latest, in each shard.
        seed: of the random vectors.
    """

    sequences: int = 4
    length: int = 64
    shards: int = 4
    relative_error: float = 0.1
    max_probes: int = 4
    max_products: int = 32
    seed: int = 0

    def refuse(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            InputError: one of them is.
        """
        least = {"sequences": 1, "length": 2, "shards": 1, "max_probes": 2, "max_products": 2}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise InputError(
                    f"curvature {name}: got {getattr(self, name)}; it must be {smallest} or more."
                )
        if not self.relative_error > 0:
            raise InputError(
                f"curvature relative_error: got {self.relative_error}; it must be above 0."
            )
        if self.shards > self.sequences:
            raise InputError(
                f"curvature shards: {self.shards} shards need `sequences` of at least as many, and "
                f"it is {self.sequences}; use fewer shards, or raise it."
            )


@dataclass(frozen=True, slots=True)
class Piece:
    """What one journal entry holds: a score's numbers for some layers in one shard."""

    score: str
    shard: int
    chunk: int
    number: int


class CurvatureProbe:
    """The steps of the measurement, for callers that time them: measure each of `pieces`, finish.

    With several processes all of them must take every step: they share each shard's sequences.

    Args:
        model: the model; none of its weights needs to want a gradient, and tied ones count once.
        batches: calibration text; withheld sequences are not touched.
        layers: what is measured, of the model's layers.
        scores: which of `CURVATURE_SCORES`.
        settings: see `CurvatureSettings`.
        folder: of the journals, one a score; None keeps none.

    Raises:
        InputError: an unknown score, or a setting out of its range.
        DataError: fewer sequences than asked for choose and count a prediction.
        StateMismatch: the folder is of another model, text or settings.
    """

    def __init__(
        self,
        model: LoadedModel,
        batches: Data,
        layers: Sequence[Layer],
        scores: Iterable[str],
        settings: CurvatureSettings | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self._settings = settings or CurvatureSettings()
        self._settings.refuse()
        self.scores = check_curvature_scores(scores)
        self._model, self.layers = model, tuple(layers)
        self._shards = _deal(batches, self._settings)
        self._batches = [
            [_cut(batches.micro_batch([row]), self._settings.length) for row in shard]
            for shard in self._shards
        ]
        self.facts = self._facts(batches)
        self.fingerprint = fingerprint(
            {**self.facts, "scores": {score: self._limit(score) for score in self.scores}}
        )
        self._journals = self._open(folder)
        chunks = -(-len(self.layers) // CHUNK)
        self.pieces = tuple(
            Piece(score, shard, chunk, shard * chunks + chunk)
            for score in self.scores
            for shard in range(len(self._shards))
            for chunk in range(chunks)
        )
        self._results: dict[Piece, Arrays] = {}

    def measure(self, piece: Piece) -> bool:
        """Measure a piece, or take it from the journal; return whether it was measured."""
        journal = self._journals.get(piece.score)
        kept = journal.read(piece.number) if journal is not None else None
        found: Arrays | None = distributed.gather(kept)[0]  # the main process alone has journals
        measured = found is None
        if found is None:
            start = piece.chunk * CHUNK
            found = self._measure(piece.score, piece.shard, self.layers[start : start + CHUNK])
            if journal is not None:
                journal.write(piece.number, found)
        self._results[piece] = found
        return measured

    def rehearse(self, score: str, most: int = CHUNK) -> float:
        """Measure some layers in the first shard, to time it; return the whole over this part.

        Products of a layer differentiate what lies above it, so those in the middle cost the mean.
        """
        start = max(0, (len(self.layers) - most) // 2)
        part = self.layers[start : start + most]
        self._measure(score, 0, part)
        return len(self.layers) * len(self._shards) / len(part)

    def finish(self) -> Curvature:
        """Put all pieces together."""
        tables = {score: self._table(score) for score in self.scores}
        traces, eigenvalues = tables.get(HESSIAN_TRACE), tables.get(TOP_EIGENVALUE)
        return Curvature(
            sequences=tuple(tuple(shard) for shard in self._shards),
            length=self._settings.length,
            counts=tuple(sum(_counted(b) for b in shard) for shard in self._batches),
            relative_error=self._settings.relative_error,
            traces=_plain(traces, "value"),
            trace_stderr=_plain(traces, "error"),
            eigenvalues=_plain(eigenvalues, "value"),
            residuals=_plain(eigenvalues, "error"),
            products=int(sum(table["products"].sum() for table in tables.values())),
            fingerprint=self.fingerprint,
            warnings=self._warnings(tables),
        )

    def _facts(self, batches: Data) -> dict[str, Any]:
        """Return what every number depends on; scores are journaled apart, to be added later."""
        s = self._settings
        first = next(self._model.module.parameters())
        return {
            "model": self._model.facts.hash,
            "data": batches.facts.hash,
            "dtype": str(first.dtype).removeprefix("torch."),
            "layers": fingerprint({"names": [layer.name for layer in self.layers]}),
            "sequences": [list(shard) for shard in self._shards],
            "length": s.length,
            "relative_error": s.relative_error,
            "seed": s.seed,
            "chunk": CHUNK,  # layers of a chunk get equally many probes
        }

    def _open(self, folder: str | Path | None) -> dict[str, Journal]:
        if folder is None or not distributed.processes().is_main:
            return {}
        return {
            score: Journal(Path(folder) / score, {**self.facts, **self._limit(score)})
            for score in self.scores
        }

    def _limit(self, score: str) -> dict[str, int]:
        """Return the limit that a score's numbers depend on."""
        if score == HESSIAN_TRACE:
            return {"max_probes": self._settings.max_probes}
        return {"max_products": self._settings.max_products}

    def _seed(self, shard: int) -> int:
        """Return the seed of a shard: its random vectors are independent of the others'."""
        state = np.random.SeedSequence([self._settings.seed, shard]).generate_state(1)
        return int(state[0])

    def _measure(self, score: str, shard: int, layers: Sequence[Layer]) -> Arrays:
        """Return value, error, and products of some layers, one row each."""
        try:
            rows = (self._traces if score == HESSIAN_TRACE else self._tops)(shard, layers)
        except Unsupported as error:
            raise Unsupported(
                f"the score {score} needs second derivatives: {error} The dual probe's scores, "
                "trace and token among them, need first derivatives alone."
            ) from error
        values = np.array([rows[layer.name] for layer in layers], dtype=np.float64)
        return {"value": values[:, 0], "error": values[:, 1], "products": values[:, 2]}

    def _traces(self, shard: int, layers: Sequence[Layer]) -> dict[str, tuple[float, ...]]:
        s = self._settings
        small, others = self._by_size(layers)
        rows: dict[str, tuple[float, ...]] = {}
        if others:
            found = layer_traces(
                self._model,
                cross_entropy(),
                self._batches[shard],
                layers=others,
                relative_error=s.relative_error,
                max_probes=s.max_probes,
                seed=self._seed(shard),
                kind="hessian",
                memory_bytes=PRODUCT_BYTES,
            )
            rows = {n: (e.value, e.stderr, e.products) for n, e in found.items()}
        for name, operator in self._operators(shard, small).items():
            rows[name] = (float(operator.dense().double().trace()), 0.0, operator.size)
        return rows

    def _tops(self, shard: int, layers: Sequence[Layer]) -> dict[str, tuple[float, ...]]:
        s = self._settings
        rows: dict[str, tuple[float, ...]] = {}
        for name, operator in self._operators(shard, [layer.name for layer in layers]).items():
            if operator.size <= s.max_products:
                eigenvalues = torch.linalg.eigvalsh(operator.dense().double())
                rows[name] = (float(eigenvalues[eigenvalues.abs().argmax()]), 0.0, operator.size)
                continue
            vector = operator.size * torch.empty(0, dtype=operator.dtype).element_size()
            pairs = top_eigenpairs(
                operator,
                1,
                tolerance=s.relative_error,
                max_products=s.max_products,
                memory_bytes=max(BASIS_BYTES, FEWEST_VECTORS * vector),
                deflate=False,  # copies of the largest eigenvalue would not change it
                seed=self._seed(shard),
            )
            rows[name] = (float(pairs.values[0]), float(pairs.residuals[0]), pairs.products)
        return rows

    def _by_size(self, layers: Sequence[Layer]) -> tuple[list[str], list[str]]:
        """Return the layers whose trace is computed exactly, and the others."""
        most = self._settings.max_probes
        return (
            [layer.name for layer in layers if layer.numel <= most],
            [layer.name for layer in layers if layer.numel > most],
        )

    def _operators(self, shard: int, names: Sequence[str]) -> dict[str, SymmetricOperator]:
        """Return the blocks of some layers, on one kept graph for each sequence."""
        if not names:
            return {}
        found = layer_operators(
            self._model,
            cross_entropy(),
            self._batches[shard],
            layers=names,
            products="autograd",
            memory_bytes=PRODUCT_BYTES,
        )
        return {name: found[name] for name in names}

    def _table(self, score: str) -> dict[str, Floats]:
        """Return a score's numbers, (D, L) each."""
        table: dict[str, Floats] = {}
        for key in ("value", "error", "products"):
            shards: dict[int, list[Floats]] = {}
            for piece in self.pieces:
                if piece.score == score:
                    shards.setdefault(piece.shard, []).append(self._results[piece][key])
            table[key] = np.stack([np.concatenate(shards[d]) for d in sorted(shards)])
        return table

    def _warnings(self, tables: dict[str, dict[str, Floats]]) -> tuple[str, ...]:
        """Say what was differentiated in half precision, and which eigenvalues are open."""
        names = [layer.name for layer in self.layers]
        parameters = choose_parameters(self._model, [self._model.parameter(n) for n in names])
        found = list(parameters.notes)
        table = tables.get(TOP_EIGENVALUE)
        if table is not None:
            asked = self._settings.relative_error
            still = (table["error"] > asked * np.abs(table["value"])).any(0)
            if still.any():
                found.append(
                    f"{TOP_EIGENVALUE}: in {int(still.sum())} of {len(names)} layers, the first is "
                    f"{names[int(still.argmax())]}, the residual is above {asked:g} of the "
                    f"eigenvalue after {self._settings.max_products} products; its magnitude may "
                    "be larger. More of them help (sensitivity.curvature.max_products)."
                )
        return tuple(found)


def check_curvature_scores(scores: Iterable[str]) -> tuple[str, ...]:
    """Return names of scores in the order of `CURVATURE_SCORES`, each once.

    Raises:
        InputError: one is not among them, or there is none.
    """
    asked = [scores] if isinstance(scores, str) else list(scores)
    for name in asked:
        if name not in CURVATURE_SCORES:
            raise InputError(
                f"{name!r} is no score of the true curvature; there are "
                f"{', '.join(CURVATURE_SCORES)}. All others come from the dual probe anyhow."
                + did_you_mean(name, CURVATURE_SCORES)
            )
    if not asked:
        raise InputError(f"no score was named; there are {', '.join(CURVATURE_SCORES)}.")
    return tuple(name for name in CURVATURE_SCORES if name in asked)


def _deal(batches: Data, settings: CurvatureSettings) -> list[list[int]]:
    """Return the rows of each shard: those that choose and count something, dealt in turn."""
    choose = ~batches.withheld
    if isinstance(batches, Sequences):
        choose = choose & batches.counted[:, 1 : settings.length].any(1)
    rows = torch.nonzero(choose)[:, 0].tolist()[: settings.sequences]
    if len(rows) < settings.sequences:
        text = isinstance(batches, Sequences)
        within = f" in their first {settings.length} tokens" if text else ""
        raise DataError(
            f"curvature sequences: {settings.sequences} were asked, and {len(rows)} of "
            f"{batches.facts.source} may choose and count a prediction{within}; ask for fewer "
            f"{batches.facts.many}, or calibrate on more."
        )
    return [rows[d :: settings.shards] for d in range(settings.shards)]


def _cut(batch: Batch, length: int) -> Batch:
    """Return a text's batch with its first tokens alone, and any other whole."""
    if not isinstance(batch, MicroBatch):
        return batch
    return MicroBatch(
        batch.index, batch.tokens[:, :length], batch.attention[:, :length],
        batch.counted[:, :length],
    )  # fmt: skip


def _counted(batch: Batch) -> int:
    return int(batch.predicts.sum())


def _plain(table: dict[str, Floats] | None, key: str) -> Table:
    return to_table(table[key]) if table is not None else ()
