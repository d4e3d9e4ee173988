"""What tuning is told, and the learning rate that it follows; no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from hawqkit.errors import InputError, did_you_mean

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "one-cycle", "constant")
LEARNED = ("none", "weights", "inputs", "both")
STARTS = ("rounded", "lsq")
BATCH_NORMS = ("frozen", "re-estimated")

WARMUP, CYCLE_WARMUP = 0.05, 0.3  # shares of the steps; the second as torch's OneCycleLR has it
CYCLE_START, CYCLE_END = 25.0, 1e4  # likewise: the peak over the first rate, that over the last


@dataclasses.dataclass(frozen=True, slots=True)
class Distillation:
    """How much the original teaches: `(1 - alpha) CE + alpha T^2 KL(p_T || q_T)`.

    p_T and q_T are the softmax of the original's and the tuned network's logits over T (Hinton et
    al. 2015, arXiv:1503.02531, section 2: the factor T^2 keeps the gradient's size).

    Attributes:
        alpha: between 0, labels alone, and 1, the original alone.
        temperature: T.
    """

    alpha: float = 0.5
    temperature: float = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class TuneSettings:
    """How to tune.

    Attributes:
        epochs: passes over the examples that train; a part of one is allowed.
        steps: of the optimizer; replaces `epochs`.
        batch: examples of a step, over all processes.
        micro_batch: examples of a forward pass; None for as many as run at full speed. Results
            differ by rounding alone.
        optimizer: `adamw` or `sgd` (with momentum, not Nesterov's).
        learning_rate: at its highest.
        momentum: of `sgd`.
        weight_decay: decoupled for `adamw`, added to the gradient for `sgd`; of matrices and
            kernels alone, not of biases, norms and scales.
        schedule: `cosine` down to 0, `one-cycle` (up, then down to nearly 0), or `constant`.
        warmup: share of the steps in which the rate rises; None for 0.05, or 0.3 of `one-cycle`.
        clip: largest norm of the whole gradient; None does not clip.
        learned_scales: which scales are trained (LSQ): `none`, `weights`, `inputs`, `both`.
        start: where learned scales begin: `rounded`, as the network is quantized without tuning, or
            `lsq`, the formula of that paper.
        distillation: from the original; None trains on labels alone.
        batch_norm: `frozen` keeps the statistics; `re-estimated` measures them again, in the
            quantized network, before the first step, after every epoch and at the end. Weights and
            biases of batch norms are trained in both.
        seed: of the order of examples.
        checkpoint_every: steps from one checkpoint to the next.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch: int = 64
    micro_batch: int | None = None
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float | None = None
    clip: float | None = None
    learned_scales: str = "none"
    start: str = "rounded"
    distillation: Distillation | None = None
    batch_norm: str = "frozen"
    seed: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        """Refuse what there is not, and numbers out of range; all problems at once."""
        problems = [*_unknown(self), *_out_of_range(self)]
        if problems:
            raise InputError("\n".join(problems))

    @property
    def learns_weights(self) -> bool:
        """Whether scales of weights are trained."""
        return self.learned_scales in ("weights", "both")

    @property
    def learns_inputs(self) -> bool:
        """Whether scales of inputs are trained."""
        return self.learned_scales in ("inputs", "both")

    def facts(self) -> dict[str, Any]:
        """Return what the result depends on: all but how often it is kept."""
        facts = dataclasses.asdict(self)
        del facts["checkpoint_every"]
        return facts


def step_count(settings: TuneSettings, examples: int) -> int:
    """Return the steps of a run over so many examples.

    >>> step_count(TuneSettings(epochs=1.5, batch=4), 10)
    4
    """
    if settings.steps is not None:
        return settings.steps
    return max(1, math.ceil(settings.epochs * examples / settings.batch))


def rate(settings: TuneSettings, step: int, steps: int) -> float:
    """Return the learning rate of a step, 0 <= step < steps; W = warmup steps.

        constant    peak min(1, (step + 1) / W)
        cosine      the same up to W, then peak (1 + cos(pi (step - W) / (steps - W))) / 2
        one-cycle   peak / 25 up to peak within W, down to peak / 25e4, each half a cosine (Smith
                    and Topin 2017, arXiv:1708.07120, as torch's OneCycleLR has it)

    >>> [round(rate(TuneSettings(learning_rate=1.0, warmup=0.5), k, 4), 3) for k in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    peak = settings.learning_rate
    cycle = settings.schedule == "one-cycle"
    share = settings.warmup if settings.warmup is not None else CYCLE_WARMUP if cycle else WARMUP
    if cycle:
        return _cycle(peak, step, share * steps - 1, steps - 1)
    warm = round(share * steps)
    if step < warm:
        return peak * (step + 1) / warm
    if settings.schedule == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2


def _cycle(peak: float, step: int, top: float, last: int) -> float:
    """Return the rate of a cycle whose peak is at the (fractional) step `top`."""
    first = peak / CYCLE_START
    if step <= top:
        return _between(first, peak, step / top if top > 0 else 1.0)
    return _between(peak, first / CYCLE_END, (step - top) / (last - top) if last > top else 1.0)


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _unknown(settings: TuneSettings) -> list[str]:
    choices: tuple[tuple[str, Sequence[str]], ...] = (
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("learned_scales", LEARNED),
        ("start", STARTS),
        ("batch_norm", BATCH_NORMS),
    )
    return [
        f"tune: {name}: got {given!r}; known are {', '.join(known)}." + did_you_mean(given, known)
        for name, known in choices
        if (given := getattr(settings, name)) not in known
    ]


def _out_of_range(settings: TuneSettings) -> list[str]:
    s, d = settings, settings.distillation
    warmup = 0.0 if s.warmup is None else s.warmup
    wrong = {
        "epochs": (s.epochs, s.steps is not None or 0 < s.epochs < math.inf, "above 0"),
        "steps": (s.steps, s.steps is None or s.steps >= 1, "at least 1"),
        "batch": (s.batch, s.batch >= 1, "at least 1"),
        "micro_batch": (s.micro_batch, s.micro_batch is None or s.micro_batch >= 1, "at least 1"),
        "learning_rate": (s.learning_rate, 0 < s.learning_rate < math.inf, "above 0"),
        "momentum": (s.momentum, 0 <= s.momentum < 1, "at least 0 and below 1"),
        "weight_decay": (s.weight_decay, 0 <= s.weight_decay < math.inf, "at least 0"),
        "warmup": (s.warmup, 0 <= warmup < 1, "at least 0 and below 1, a share of the steps"),
        "clip": (s.clip, s.clip is None or s.clip > 0, "above 0, or null for no clipping"),
        "checkpoint_every": (s.checkpoint_every, s.checkpoint_every >= 1, "at least 1"),
    }
    if d is not None:
        wrong["distillation.alpha"] = (d.alpha, 0 < d.alpha <= 1, "above 0 and at most 1")
        wrong["distillation.temperature"] = (d.temperature, 0 < d.temperature < math.inf, "above 0")
    return [
        f"tune: {name}: got {given!r}; it must be {must}."
        for name, (given, fine, must) in wrong.items()
        if not fine
    ]
