"""How long each layer takes in each format: `latency.csv`, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hawqkit.errors import InputError


@dataclass(frozen=True, slots=True)
class LayerTime:
    """The time of one layer in one format, for one run over a batch.

    Attributes:
        layer: its name.
        shape: key of what it computes, as `allocation.latency.shape_key` makes it.
        format: name of the format.
        milliseconds: of one run.
        stderr: standard error of it.
        alone: milliseconds of the layer as a graph of its own, without what any run takes.
        operation: what it computes, for people: `Conv 16x16x3x3 on 8x16x28x28`.
    """

    layer: str
    shape: str
    format: str
    milliseconds: float
    stderr: float
    alone: float
    operation: str = ""


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Times of all layers in all formats, such that they add up to those of whole models.

    Attributes:
        rows: layer by layer, format by format.
        fixed: milliseconds of what is in no layer.
        fixed_stderr: standard error of it.
        misfit: root mean square of (sum of the table - measured) / measured, over the mixes whose
            whole models were timed; each was left out of the table that predicts it.
        mixes: how many.
        runtime: name and version.
        batch: examples in one run.
        threads: of the runtime.
    """

    rows: tuple[LayerTime, ...]
    fixed: float
    fixed_stderr: float
    misfit: float
    mixes: int
    runtime: str
    batch: int
    threads: int

    def predict(self, mix: Mapping[str, str]) -> float:
        """Return the milliseconds of a whole model: fixed + sum over layers of their times.

        Args:
            mix: layer name -> format name; a layer that it does not name has `none`.

        Raises:
            InputError: a layer of the table has no row for its format.
        """
        times = {(row.layer, row.format): row.milliseconds for row in self.rows}
        layers = dict.fromkeys(row.layer for row in self.rows)
        wanted = [(layer, mix.get(layer, "none")) for layer in layers]
        missing = [f"{layer} in {name}" for layer, name in wanted if (layer, name) not in times]
        if missing:
            raise InputError(
                f"the latency table has no row for {', '.join(missing)}; measure them."
            )
        return self.fixed + sum(times[key] for key in wanted)
