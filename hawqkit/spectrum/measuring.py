"""Spectra of a network and its layers: chosen, measured in turn, kept, and put into one record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hawqkit.curvature.gauss_newton import gauss_newton
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.layer_traces import layer_traces
from hawqkit.curvature.layers import check_kind, choose_layers
from hawqkit.curvature.objective import Objective, cross_entropy
from hawqkit.curvature.of_model import ModelOperator
from hawqkit.curvature.operator import SymmetricOperator
from hawqkit.distributed import gather, processes
from hawqkit.errors import InputError
from hawqkit.journal import Journal
from hawqkit.models.batch import Data
from hawqkit.models.layers import block_of
from hawqkit.models.model import LoadedModel
from hawqkit.records import WHOLE_NETWORK, Estimate, Spectrum
from hawqkit.spectrum.blocks import (
    BlockSettings,
    MeasuredBlock,
    check_settings,
    measure_block,
    pack_block,
    summarize_block,
    unpack_block,
)
from hawqkit.spectrum.identity import batches_identity, model_identity
from hawqkit.spectrum.serving import served
from hawqkit.spectrum.watching import WatchedOperator
from hawqkit.store import fingerprint

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]

ALL = "all"
TRACES = 0  # numbers of the journal's entries: then the whole network, then the layers
WHOLE = 1
FIRST_LAYER = 2
# Traces that only decide which layers are looked at need not be exact.
TRACE_ERROR, TRACE_PROBES = 0.1, 64
# Tokens of a batch: enough to run near full speed on a CPU, few enough that a graph of second
# derivatives stays below 4 GiB for a model of 135 million weights.
BATCH_TOKENS = {"gauss-newton": 512, "hessian": 256}
EXAMPLES = 32  # of a classifier in a batch
# Products of several vectors are cut into chunks that fit. A constant, since the rounding of a
# product depends on the chunks, and a resumed run must give the same bits.
PRODUCT_BYTES = 2 << 30

_TOP = re.compile(r"top-([1-9]\d*)")


@dataclass(frozen=True, slots=True)
class SpectrumSettings:
    """What is measured, and how.

    Attributes:
        kind: `gauss-newton`, positive semidefinite, the Fisher matrix of a softmax; or `hessian`,
            which shows negative curvature too.
        layers: `all`; `top-N`, the N layers of largest Gauss-Newton trace; or patterns of names;
            an empty tuple for none.
        whole: also the matrix over all parameters.
        eps: thresholds of |lambda| for rank and degeneracy, in the loss's units.
        each: how each block is measured.
    """

    kind: str = "gauss-newton"
    layers: str | tuple[str, ...] = "top-8"
    whole: bool = True
    eps: tuple[float, ...] = (1e-2, 1e-4, 1e-6)
    each: BlockSettings = field(default_factory=BlockSettings)


def measure_spectrum(
    model: nn.Module | LoadedModel,
    batches: Iterable[Any] | Data,
    settings: SpectrumSettings | None = None,
    *,
    objective: Objective | None = None,
    folder: str | Path | None = None,
    track: Track | None = None,
) -> Spectrum | None:
    """Measure density, top eigenpairs, rank and degeneracy of layers and of the whole network.

    On several processes each multiplies with its share of the batches, and the main process does
    the rest.

    Args:
        model: a network in eval mode.
        batches: `Data`, or a list of batches as for `hessian`.
        settings: what and how.
        objective: the loss; cross-entropy by default.
        folder: keeps each finished block, its eigenvectors, and the draw under way: a killed run
            goes on there and ends with the same bits.
        track: shows progress; given the blocks, a word, and how many there are.

    Returns:
        the record; None in processes other than the main one.

    Raises:
        InputError: a pattern matches no layer, or a number is out of its range.
        StateMismatch: the folder is of another model, of other data or settings.
    """
    settings = settings or SpectrumSettings()
    check_kind(settings.kind)
    check_settings(settings.each, settings.eps)
    run = _Run(model, batches, settings, objective or cross_entropy(), folder)
    chosen = run.choose()
    if not chosen and not settings.whole:
        raise InputError("nothing is to be measured: name layers, or ask for the whole network.")
    measured: dict[str, MeasuredBlock] = {}
    with served(run.operators(chosen)) as operators:
        for name in (track or _untracked)(operators, "spectrum", len(operators)):
            measured[name] = run.measure(name, WatchedOperator(name, operators[name]))
    return run.record(measured) if processes().is_main else None


def operators_of(
    model: nn.Module | LoadedModel,
    batches: Iterable[Any] | Data,
    settings: SpectrumSettings,
    objective: Objective,
    chosen: tuple[str, ...],
) -> dict[str, SymmetricOperator]:
    """Return the operators that are measured: layers first, since they are quick.

    Every product of a layer's Hessian differentiates one kept graph, that of the whole network too,
    where each process has a single batch: its graph is made for a product anyhow, and keeping it
    does not raise the peak of memory. Several graphs might not fit together.

    Args:
        model: a network in eval mode.
        batches: as for `measure_spectrum`.
        settings: which matrix, and whether the whole network's too.
        objective: the loss.
        chosen: names of layers.
    """
    batches = batches_of(batches, settings.kind)
    groups = choose_layers(model, chosen) if chosen else {}
    parameters = None if settings.whole else [n for group in groups.values() for n in group]
    whole: ModelOperator
    if settings.kind == "hessian":
        whole = hessian(
            model,
            objective,
            batches,
            parameters=parameters,
            keep_graphs=sum(1 for _ in batches) <= processes().count,
            memory_bytes=PRODUCT_BYTES,
        )
    else:
        whole = gauss_newton(
            model, objective, batches, parameters=parameters, memory_bytes=PRODUCT_BYTES
        )
    found: dict[str, SymmetricOperator] = {n: whole.block(*group) for n, group in groups.items()}
    return {**found, WHOLE_NETWORK: whole} if settings.whole else found


def resolve_layers(
    model: nn.Module | LoadedModel, layers: str | Sequence[str]
) -> tuple[tuple[str, ...], int | None]:
    """Return the layers that may be measured, and how many of them if a trace decides.

    Args:
        model: the network.
        layers: `all`, `top-N`, or patterns of names.

    Raises:
        InputError: a pattern matches none, or N is more than there are.
    """
    if not isinstance(layers, str):
        return (tuple(choose_layers(model, layers)), None) if len(layers) else ((), None)
    known = tuple(choose_layers(model))
    if layers == ALL:
        return known, None
    match = _TOP.fullmatch(layers)
    if match is None:
        raise InputError(
            f"layers: got {layers!r}; it must be 'all', 'top-N' with a number N, or a list of "
            "patterns."
        )
    count = int(match[1])
    if count > len(known):
        raise InputError(f"layers: {layers} asks for more than the {len(known)} layers there are.")
    return known, count


class _Run:
    """One call of `measure_spectrum`."""

    def __init__(
        self,
        model: nn.Module | LoadedModel,
        batches: Iterable[Any] | Data,
        settings: SpectrumSettings,
        objective: Objective,
        folder: str | Path | None,
    ) -> None:
        self.model, self.settings, self.objective = model, settings, objective
        self.candidates, self.count = resolve_layers(model, settings.layers)
        module = model.module if isinstance(model, LoadedModel) else model
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.source, self.model_hash = model_identity(model)
        self.data = batches.facts if isinstance(batches, Data) else None
        self.known = tuple(choose_layers(model)) if self.candidates else ()
        self.facts = {
            "spectrum": settings.kind,
            "objective": objective.name,
            "model": self.model_hash,
            "data": batches_identity(batches),
            "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
            "layers": fingerprint({"names": list(self.known)}),
            **asdict(settings.each),
        }
        self.batches = batches_of(batches, settings.kind)
        self.traces: dict[str, Estimate] = {}
        self.folder = Path(folder) if folder is not None else None
        main = processes().is_main
        self.journal = Journal(folder, self.facts) if folder is not None and main else None

    def choose(self) -> tuple[str, ...]:
        """Return the layers that are measured, in the model's order."""
        if self.count is None:
            return self.candidates
        kept = self.journal.read(TRACES) if self.journal is not None else None
        if gather(kept is not None)[0]:
            traces = _unpack_traces(kept) if kept is not None else {}
        else:
            traces = layer_traces(
                self.model,
                self.objective,
                self.batches,
                relative_error=TRACE_ERROR,
                max_probes=TRACE_PROBES,
                seed=self.settings.each.seed,
                kind="gauss-newton",
                memory_bytes=PRODUCT_BYTES,
            )
            if self.journal is not None:
                self.journal.write(TRACES, _pack_traces(traces))
        self.traces = traces = gather(traces)[0]
        order = sorted(traces, key=lambda name: -traces[name].value)
        best = set(order[: self.count])
        return tuple(name for name in self.candidates if name in best)

    def operators(self, chosen: tuple[str, ...]) -> dict[str, SymmetricOperator]:
        """Return the operators that are measured."""
        return operators_of(self.model, self.batches, self.settings, self.objective, chosen)

    def measure(self, name: str, operator: SymmetricOperator) -> MeasuredBlock:
        """Measure a block, or take it from the journal."""
        number = WHOLE if name == WHOLE_NETWORK else FIRST_LAYER + self.known.index(name)
        if self.journal is None or self.folder is None:
            return measure_block(operator, self.settings.each)
        kept = self.journal.read(number)
        if kept is not None:
            return unpack_block(kept)
        measured = measure_block(
            operator,
            self.settings.each,
            folder=self.folder / block_folder(name, self.known),
            facts={**self.facts, "block": name},
            shapes={key: self.shapes[key] for key in operator.blocks},
        )
        self.journal.write(number, pack_block(measured))
        return measured

    def record(self, measured: Mapping[str, MeasuredBlock]) -> Spectrum:
        """Return everything as one record."""
        plain = _plain(self.settings)
        blocks = {
            name: summarize_block(name, block_of(name), found, self.settings.eps)
            for name, found in measured.items()
        }
        order = [name for name in self.known if name in blocks]
        names = {"blocks": order, "traced": self.count is not None}
        return Spectrum(
            kind=self.settings.kind,
            objective=self.objective.name,
            blocks=tuple(blocks[name] for name in order),
            whole=blocks.get(WHOLE_NETWORK),
            traces=self.traces,
            settings=plain,
            model=self.source,
            model_hash=self.model_hash,
            data=self.data,
            fingerprint=fingerprint({**self.facts, **names, "settings": plain}),
            warnings=_warnings(blocks),
            densities={name: found.density for name, found in measured.items()},
        )


def block_folder(name: str, known: Sequence[str]) -> str:
    """Return the folder of a block's eigenvectors and draws: names of layers may hold anything.

    >>> block_folder("b.c", ["a", "b.c"]), block_folder(WHOLE_NETWORK, [])
    ('layer-0001', 'whole')
    """
    return "whole" if name == WHOLE_NETWORK else f"layer-{known.index(name):04d}"


def batches_of(batches: Iterable[Any] | Data, kind: str) -> Iterable[Any]:
    """Return batches of several sequences, but one at least for each process."""
    if not isinstance(batches, Data):
        return batches
    chosen = [row for row, held in enumerate(batches.withheld.tolist()) if not held]
    share = -(-len(chosen) // processes().count)
    # An image is many positions to the layers inside, whatever its facts call its length.
    most = EXAMPLES if batches.facts.classes else BATCH_TOKENS[kind] // batches.facts.length
    size = max(1, min(share, most))
    return [batches.micro_batch(chosen[i : i + size]) for i in range(0, len(chosen), size)]


def _plain(settings: SpectrumSettings) -> dict[str, Any]:
    """Return settings as a record keeps them."""
    layers = settings.layers if isinstance(settings.layers, str) else list(settings.layers)
    return {
        "kind": settings.kind,
        "layers": layers,
        "global": settings.whole,
        "eps": list(settings.eps),
        **asdict(settings.each),
    }


def _warnings(blocks: Mapping[str, Any]) -> tuple[str, ...]:
    lifted = sum(any(u > a for u, a in zip(b.ranks.eps, b.ranks.asked, strict=True))
                 for b in blocks.values())  # fmt: skip
    unfinished = sum(b.top is not None and not all(b.top.converged) for b in blocks.values())
    blind = sum(not all(map(b.resolves, range(len(b.ranks.eps)))) for b in blocks.values())
    found = []
    if blind:
        found.append(
            f"in {blind} of {len(blocks)} spectra the bounds of the rank at some eps leave more "
            "than a tenth of the eigenvalues open: more steps narrow them"
        )
    if lifted:
        found.append(
            f"in {lifted} of {len(blocks)} spectra a threshold eps lies below the measured noise "
            "floor of the products and was lifted to it"
        )
    if unfinished:
        found.append(f"in {unfinished} of {len(blocks)} spectra not all top pairs have converged")
    return tuple(found)


def _pack_traces(traces: Mapping[str, Estimate]) -> dict[str, Any]:
    plain = {name: asdict(estimate) for name, estimate in traces.items()}
    return {"traces": np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)}


def _unpack_traces(arrays: Mapping[str, Any]) -> dict[str, Estimate]:
    plain = json.loads(np.asarray(arrays["traces"], dtype=np.uint8).tobytes())
    return {
        name: Estimate(**{**e, "interval": None if e["interval"] is None else tuple(e["interval"])})
        for name, e in plain.items()
    }


def _untracked(items: Iterable[Any], stage: str, total: int) -> Iterable[Any]:
    return items
