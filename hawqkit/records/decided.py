"""Records of what is decided and shown: mixes, allocations, frontiers, validations, provenance."""

from __future__ import annotations

from dataclasses import dataclass, field

from hawqkit.records.activations import ActivationRanges
from hawqkit.records.classified import Classification
from hawqkit.records.linearized import Linearized
from hawqkit.records.measured import CROSS_ENTROPY, DataFacts
from hawqkit.records.schema import SCHEMA


@dataclass(frozen=True, slots=True)
class Totals:
    """What a mix takes: its three sizes, told apart, and what it does with them.

    Attributes:
        average_bits: sum of numel * code bits / sum of numel, over the selected layers.
        bits_per_weight: the same with scales, zero points and padding.
        size: target -> bytes of all files which that target writes.
        bops: bit operations for one example, None where operations were not counted.
        latency_ms: milliseconds by the table of a latency budget, None without one.
    """

    average_bits: float
    bits_per_weight: float
    size: dict[str, int] = field(default_factory=dict)
    bops: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Certificate:
    """Proof of optimality: no allocation within the budgets has a summed score below `bound`."""

    solver: str
    status: str
    objective: float
    bound: float
    relative_gap: float
    groups: int
    variables: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted mean KL of one whole mix, in nats, from sequences that did not choose it.

    Attributes:
        kl: sum over layers of 1/2 (g . dW)^2 / n.
        joint: 1/2 (sum over layers of g . dW)^2 / n, that is with the interactions between layers.
        interactions: joint - kl.
        spread: sqrt(2 / participation ratio of the network), relative: what random rounding does.
        sequences: number of sequences behind the figures.
        cross_fitted: the procedure's KL: chosen on the other folds, predicted on each in turn.
    """

    kl: float
    kl_stderr: float
    joint: float
    joint_stderr: float
    interactions: float
    interactions_stderr: float
    spread: float | None
    sequences: int
    cross_fitted: float | None = None
    cross_fitted_stderr: float | None = None


@dataclass(frozen=True, slots=True)
class Mix:
    """One assignment of formats to layers, with its sizes and its predicted loss.

    `objective` is None for an imported mix with formats that were not probed.
    """

    name: str
    about: str
    layers: dict[str, str]
    totals: Totals
    objective: float | None
    prediction: Prediction | None = None


@dataclass(frozen=True, slots=True)
class KlBudget:
    """How `budget.max_predicted_kl` was kept, and the proof that no smaller mix was overlooked.

        upper = kl + quantile sqrt((spread kl)^2 + kl_stderr^2)    must be at most `value`

    Of every size the mix of smallest summed score is found exactly; the smallest size at which that
    mix keeps the limit is chosen. No mix of less than `amount_bound` has a summed score of
    `score_limit` or less, and the best one there does not keep the limit.

    Attributes:
        value: the limit as asked, in nats.
        confidence: as asked; at 0.5 the prediction itself is limited.
        quantile: z, of the standard normal.
        kl: predicted KL of the chosen mix.
        kl_stderr: its standard error, None where there is none.
        spread: sqrt(2 / participation ratio of the network), relative; None where not known.
        upper: what the KL stays below with that confidence.
        source: what predicts: `withheld sequences` (or `images`, `texts`, `examples`), or `the
            scores that choose`.
        sequences: how many.
        minimized: what was made small, `bytes of TARGET` or `stored bits`.
        amount: what the mix takes of it; headers of files stay outside.
        amount_bound: proven lower bound on it; `amount` itself, or less by at most 1e-5 of it.
        score_limit: summed score of the chosen mix, in nats: what the solver kept the sum below.
        smaller_amount: of the best mix of less than `amount_bound`, None where there is none.
        smaller_score: its summed score, above `score_limit`.
        smaller_upper: its upper limit, above `value`.
        solves: allocations that were solved.
    """

    value: float
    confidence: float
    quantile: float
    kl: float
    kl_stderr: float | None
    spread: float | None
    upper: float
    source: str
    sequences: int
    minimized: str
    amount: int
    amount_bound: int
    score_limit: float
    smaller_amount: int | None = None
    smaller_score: float | None = None
    smaller_upper: float | None = None
    solves: int = 0


@dataclass(frozen=True, slots=True)
class OtherRisk:
    """What another `risk` would choose within the same budgets.

    Attributes:
        risk: 0 where the chosen mix has a risk, else 1.
        deviation: what one unit of risk adds to the score of a layer, in words.
        mix: its formats, sizes and prediction; `objective` is at the risk of the allocation.
        deviations: layer -> what one unit of risk adds to its score in the format of the
            allocation, relative.
    """

    risk: float
    deviation: str
    mix: Mix
    deviations: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Allocation:
    """The bit configuration: `allocation.json`.

    Attributes:
        layers: layer name -> format name.
        budgets: name -> limit, as asked; `max_predicted_kl` in nats.
        totals: what the mix really takes.
        score: the score that chose.
        objective: summed score of the chosen mix, in nats (quiet, but seen by the choice).
        prediction: what sequences say that the choice has not seen.
        stability: layer -> share of resampled probes in which it keeps its format.
        baselines: other mixes within the same budgets.
        sensitivities: fingerprint of the table that was solved.
        kl_budget: how `max_predicted_kl` was kept, None if it was not asked for.
        other_risk: the mix of another risk, None where a deviation that it needs is not known.
        activations: ranges of the layers' inputs, None where no format rounds inputs; in memory
            only, since they have a file of their own.
        interactions: how much of what layers do together entered the choice, 0 for none. The summed
            score is then not the least, but within a tenth of it; the certificate says how far.
        loss: name of the loss whose increase is predicted. Where it is not the cross-entropy, what
            is called KL here, in nats, is the increase of that loss to second order.
    """

    layers: dict[str, str]
    budgets: dict[str, float]
    totals: Totals
    runtime: str
    score: str
    risk: float
    objective: float
    certificate: Certificate
    prediction: Prediction | None = None
    stability: dict[str, float] = field(default_factory=dict)
    baselines: tuple[Mix, ...] = ()
    model: str = ""
    sensitivities: str = ""
    rounding: str = "searched"
    warnings: tuple[str, ...] = ()
    kl_budget: KlBudget | None = None
    other_risk: OtherRisk | None = None
    interactions: float = 0.0
    loss: str = CROSS_ENTROPY
    schema: int = SCHEMA
    activations: ActivationRanges | None = field(default=None, repr=False, metadata={"json": False})


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """The best summed score at one size; the truth is proven to lie in [bound, objective]."""

    average_bits: float
    bits_per_weight: float
    objective: float
    bound: float


@dataclass(frozen=True, slots=True)
class Frontier:
    """Size against predicted loss: `frontier.json`; `uniform` holds (format, point) to compare."""

    points: tuple[FrontierPoint, ...]
    uniform: dict[str, FrontierPoint]
    chosen: FrontierPoint
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class Measured:
    """One mix on one text: token means, with standard errors clustered by document.

    Attributes:
        kl: mean KL(original || quantized) in nats per counted prediction.
        same_top1: share of predictions whose most likely token stays the same.
        loss: mean cross-entropy of the quantized model, in nats.
        difference: kl(this mix) - kl(chosen mix), paired by sequence.
    """

    kl: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    same_top1: float
    same_top1_stderr: float
    loss: float
    loss_stderr: float
    perplexity: float
    difference: float
    difference_stderr: float


@dataclass(frozen=True, slots=True)
class ValidatedMix:
    """A mix with what was measured on each text; the key is the text's name.

    Attributes:
        linearized: prediction and measurement on the withheld sequences; None where none were
            withheld, or where the warnings say why there is no such prediction.
    """

    name: str
    about: str
    totals: Totals
    prediction: Prediction | None
    measured: dict[str, Measured]
    linearized: Linearized | None = None


@dataclass(frozen=True, slots=True)
class Validation:
    """Predicted against measured, on text that the choice never saw: `validation.json`.

    Attributes:
        texts: name -> facts of the text; `held-out` is of the calibration's source.
        original: text -> (loss, stderr) of the original model.
        mixes: the chosen mix first, then the baselines.
        classification: text -> what a classifier does there; empty for a language model.
        calibration: what the original and the chosen mix do with the examples that chose, without
            confusion and flips; None where it was not measured.
    """

    texts: dict[str, DataFacts]
    original: dict[str, tuple[float, float]]
    mixes: tuple[ValidatedMix, ...]
    allocation: str = ""
    warnings: tuple[str, ...] = ()
    classification: dict[str, Classification] = field(default_factory=dict)
    calibration: Classification | None = None
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage took. One gradient-equivalent is one plain forward and backward pass."""

    seconds: float
    gradient_equivalents: float = 0.0
    peak_memory_bytes: int = 0
    predicted_seconds: float | None = None
    predicted_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Everything that may differ between two equal runs: `provenance.json`."""

    versions: dict[str, str]
    host: str
    platform: str
    started: str
    finished: str
    resumes: int
    processes: int
    devices: tuple[str, ...]
    seeds: dict[str, int]
    hashes: dict[str, str]
    costs: dict[str, Cost]
    schema: int = SCHEMA
