"""Predict what a run takes from its first micro-batch, and remember what it took."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from hawqkit import distributed
from hawqkit.pipeline.folder import RunFolder
from hawqkit.records import Cost, Provenance
from hawqkit.store import write_record
from hawqkit.validation.validating import LINEARIZED_TOKENS

if TYPE_CHECKING:
    from hawqkit.models import Data

PACKAGES = (
    "hawqkit", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors",
    "numpy", "scipy", "gguf", "compressed-tensors", "matplotlib",
)  # fmt: skip

# A forward pass of validation over a micro-batch of the probe, and what does not grow with the
# model: solver, resamples, export, report. On the quickstart, two idle cores: 0.27 and 7 s.
FORWARD_SHARE = 0.30
FIXED_SECONDS = 8.0
# Of a mix with its tangents: in forward mode a product with a weight becomes three; the parabola
# takes two passes more, the mix itself one.
LINEARIZED_PASSES = 6


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run is predicted to take.

    Attributes:
        seconds: stage -> seconds.
        memory_bytes: peak of the process (CPU) or of the device's allocator.
    """

    seconds: dict[str, float]
    memory_bytes: int

    @property
    def total_seconds(self) -> float:
        """All stages together."""
        return sum(self.seconds.values())


def estimate(
    *,
    load_seconds: float,
    round_seconds: float,
    batch_seconds: float,
    peak_bytes: int,
    batches: int,
    batch_tokens: int,
    validation_tokens: int,
    mixes: int,
    curvature_seconds: float = 0.0,
    spectrum_seconds: float = 0.0,
    activation_seconds: float = 0.0,
    tuning_seconds: float = 0.0,
    calibration_tokens: int = 0,
    withheld_tokens: int = 0,
) -> Estimate:
    """Predict a run from what its beginning took.

    Args:
        load_seconds: loading model and texts.
        round_seconds: rounding every layer to every format, once.
        batch_seconds: the first micro-batch.
        peak_bytes: memory at its peak while the first micro-batch ran.
        batches: micro-batches of this process.
        batch_tokens: tokens of a micro-batch.
        validation_tokens: tokens of all held-out texts.
        mixes: mixes that validation measures.
        curvature_seconds: the scores of the true Hessian, 0 where none is asked for.
        spectrum_seconds: the spectrum, 0 where it is not asked for.
        activation_seconds: the ranges of the layers' inputs, 0 where none are needed.
        tuning_seconds: tuning the mix, 0 where it is not asked for.
        calibration_tokens: those that chose, if validation measures the original and the chosen mix
            on them too.
        withheld_tokens: those kept from choosing, on which validation linearizes the chosen mix.
    """
    tokens = validation_tokens * (1 + mixes) + 2 * calibration_tokens
    tokens += LINEARIZED_PASSES * withheld_tokens
    rounded = mixes + (withheld_tokens > 0) + (calibration_tokens > 0)
    passes = tokens / max(batch_tokens, 1)
    seconds = {
        "load": load_seconds,
        "probe": round_seconds + batch_seconds * batches,
        "allocate, export, report": FIXED_SECONDS,
        "validate": passes * batch_seconds * FORWARD_SHARE + round_seconds / 6 * rounded,
    }
    if activation_seconds > 0:
        seconds["activations"] = activation_seconds
    if curvature_seconds > 0:
        seconds["curvature"] = curvature_seconds
    if spectrum_seconds > 0:
        seconds["spectrum"] = spectrum_seconds
    if tuning_seconds > 0:
        seconds["tune"] = tuning_seconds
    return Estimate(seconds, peak_bytes)


def choosing_tokens(calibration: Data) -> int:
    """Return the tokens that chose, or images; none of text, on which nothing is validated."""
    facts = calibration.facts
    if not facts.classes:
        return 0
    return round(facts.tokens * float((~calibration.withheld).double().mean()))


def predicting_tokens(calibration: Data) -> int:
    """Return the tokens, or images, that were kept from choosing."""
    tokens = round(calibration.facts.tokens * float(calibration.withheld.double().mean()))
    return tokens if calibration.facts.classes else min(tokens, LINEARIZED_TOKENS)


class Ledger:
    """The provenance of a run folder while it grows."""

    def __init__(self, run: RunFolder, seeds: Mapping[str, int], hashes: Mapping[str, str]) -> None:
        before = run.read_provenance()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        here = distributed.processes()
        self._run = run
        self._record = Provenance(
            versions=_versions(),
            host=socket.gethostname(),
            platform=f"{platform.platform()}, Python {platform.python_version()}",
            started=before.started if before else now,
            finished=now,
            resumes=before.resumes + 1 if before else 0,
            processes=here.count,
            devices=tuple(distributed.gather(here.device)),
            seeds=dict(seeds),
            hashes=dict(hashes),
            costs=dict(before.costs) if before else {},
        )

    def note(self, stage: str, cost: Cost) -> None:
        """Remember a stage's cost; a stage that ran again replaces what stood there."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        costs = {**self._record.costs, stage: cost}
        self._record = replace(self._record, costs=costs, finished=now)
        if distributed.processes().is_main:
            write_record(self._run.provenance, self._record)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
