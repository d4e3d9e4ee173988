"""Run the original and the quantized model over held-out data; keep how predictions differ.

Letters: S sequences, T positions, V vocabulary, N counted predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hawqkit.costs import available_bytes
from hawqkit.models.batch import Batch, Data, predictions, refuse_labels
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.apply import applied
from hawqkit.records import ActivationRanges, Floats, Integers

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]

ROWS = 128  # positions handled at once: bounds temporaries to ROWS * V numbers
KEEP_SHARE = 0.2  # of the free memory, that the original's logits may take
KEEP_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class TokenResults:
    """What one model does on each counted prediction of one text, or each example of a classifier.

    Attributes:
        classes: V.
        sequence: (N,) sequence, or example, of the prediction.
        kl: (N,) KL(original || this) in nats.
        same_top1: (N,) 1 where the most likely token is the original's.
        loss: (N,) cross-entropy of the true token, in nats.
        target: (N,) the true token, or class.
        top1: (N,) the most likely one.
        probability: (N,) that it has.
    """

    classes: int
    sequence: Integers
    kl: Floats
    same_top1: Floats
    loss: Floats
    target: Integers
    top1: Integers
    probability: Floats


@dataclass(frozen=True, slots=True)
class Variant:
    """Another model that is measured against the original: the original after tuning, say.

    Attributes:
        model: of the same predictions.
        mix: layer -> format, put into it while it is measured.
        activations: ranges of its layers' inputs, for formats that round them.
    """

    model: LoadedModel
    mix: Mapping[str, str]
    activations: ActivationRanges | None = None


def measure_text(
    model: LoadedModel,
    mixes: Mapping[str, Mapping[str, str]],
    text: Data,
    *,
    rounding: str,
    activations: ActivationRanges | None = None,
    batch: int = 4,
    track: Track,
    stage: str = "validate",
    rows: Sequence[int] | None = None,
    variants: Mapping[str, Variant] | None = None,
) -> tuple[TokenResults, dict[str, TokenResults]]:
    """Measure every mix against the original model on one text.

    The original's logits are kept where they take little memory, and made again beside each mix
    where they do not; the results are the same. The model is restored bit for bit, also when
    something raises.

    Args:
        model: the original.
        mixes: name -> (layer -> format).
        text: held-out sequences, or examples.
        rounding: as in the run that chose.
        activations: ranges of the layers' inputs, for formats that round them.
        batch: sequences that go through the model together.
        track: shows progress over forward passes.
        stage: the name that progress is shown under.
        rows: the sequences or examples to measure on; by default all.
        variants: further models, by name; they are restored too.

    Returns:
        results of the original (its `kl` is zero), of each mix and of each variant.
    """
    rows = range(len(text)) if rows is None else rows
    batches = [text.micro_batch(rows[i : i + batch]) for i in range(0, len(rows), batch)]
    vocabulary = _classes(model, text)
    wanted = int(text.facts.counted) * vocabulary * 4
    keep = wanted <= min(KEEP_BYTES, KEEP_SHARE * available_bytes(str(model.device)))
    everything = {n: Variant(model, mix, activations) for n, mix in mixes.items()}
    everything |= variants or {}
    total = len(batches) * (1 + len(everything) * (1 if keep else 2))
    passes = iter(track(range(total), stage, total))
    kept: list[Tensor] = []
    original = []
    for part in batches:
        logits = _counted_logits(model, part, passes)
        original.append(_compare(logits, logits, part))
        if keep:
            kept.append(logits)
    results = {}
    for name, one in everything.items():
        parts = []
        with applied(one.model, one.mix, rounding=rounding, activations=one.activations) as switch:
            for number, part in enumerate(batches):
                if keep:
                    reference = kept[number]
                else:
                    switch.original()
                    reference = _counted_logits(model, part, passes)
                    switch.quantized()
                parts.append(_compare(reference, _counted_logits(one.model, part, passes), part))
        results[name] = _join(parts)
    next(passes, None)  # lets a progress bar see its end
    return _join(original), results


def _classes(model: LoadedModel, text: Data) -> int:
    """Return the number of logits of a prediction: the vocabulary, or the classes."""
    if text.facts.classes:
        return text.facts.classes
    head = model.module.get_output_embeddings()  # type: ignore[operator]
    return int(head.weight.shape[0])


@torch.no_grad()
def _counted_logits(model: LoadedModel, part: Batch, passes: Iterator[Any]) -> Tensor:
    """Return the logits of counted predictions, (n, V) in float32 or better."""
    next(passes)
    logits = predictions(model.module, part, model.device)
    chosen = logits[part.predicts.to(logits.device)]
    refuse_labels(part.targets, part.predicts, chosen.shape[-1])
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))


@torch.no_grad()
def _compare(original: Tensor, changed: Tensor, part: Batch) -> TokenResults:
    mask = part.predicts
    target = part.targets[mask].to(changed.device)
    kl, same, loss, top, sure = [], [], [], [], []
    for start in range(0, len(changed), ROWS):
        rows = slice(start, start + ROWS)
        log_q = changed[rows].log_softmax(-1)
        loss.append(-log_q.gather(1, target[rows, None])[:, 0])
        top.append(log_q.argmax(-1))
        sure.append(log_q.gather(1, top[-1][:, None])[:, 0].exp())
        if original is changed:
            kl.append(torch.zeros_like(loss[-1]))
            same.append(torch.ones_like(loss[-1]))
            continue
        log_p = original[rows].log_softmax(-1)
        same.append((log_p.argmax(-1) == top[-1]).to(log_q.dtype))
        kl.append(log_p.exp().mul_(log_p.sub_(log_q)).sum(-1))
    sequence = part.index[:, None].expand_as(mask)[mask]
    return TokenResults(
        classes=changed.shape[-1],
        sequence=sequence.numpy().astype(np.int64),
        kl=_floats(kl),
        same_top1=_floats(same),
        loss=_floats(loss),
        target=target.cpu().numpy().astype(np.int64),
        top1=torch.cat(top).cpu().numpy().astype(np.int64),
        probability=_floats(sure),
    )


def _floats(parts: list[Tensor]) -> Floats:
    return torch.cat(parts).double().cpu().numpy()


def _join(parts: list[TokenResults]) -> TokenResults:
    names = ("sequence", "kl", "same_top1", "loss", "target", "top1", "probability")
    arrays = (np.concatenate([getattr(p, n) for p in parts]) for n in names)
    return TokenResults(parts[0].classes, *arrays)
