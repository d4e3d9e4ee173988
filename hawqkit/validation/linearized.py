"""The KL of a mix with logits that are linear in its errors, and a softmax that is exact.

The quadratic prediction of a mix cuts off two series: that of the softmax, and that of the network
before it. Here the first stays whole,

    KL(softmax(z) || softmax(z + sum over layers of J_l dW_l)),

from one pass in forward mode, where all layers' errors are the tangents of their weights at once.
A parabola through the logits at a quarter of the errors to either side adds what the network does
beyond first order. The same examples then go through the mix itself, so that the comparison is
paired.

Letters in shapes: b examples, n counted predictions of a batch, V classes, S examples in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hawqkit.curvature.parameters import Parameters
from hawqkit.curvature.passes import differentiable, refuse_training_mode
from hawqkit.errors import InputError, NumericalError
from hawqkit.formats import parse_format
from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.apply import Switch, applied
from hawqkit.quantize.input_rounding import input_modules, input_quantizer
from hawqkit.records import ActivationRanges, Floats, Integers, Linearized
from hawqkit.statistics import cluster_sums, jackknife
from hawqkit.validation.derivative import (
    DIFFERENCE,
    FORWARD,
    Derivative,
    Rounding,
    counted_logits,
)
from hawqkit.validation.measuring import ROWS, Track

_COLUMNS = ("quadratic", "kl", "measured", "parabolic", "count")


@torch.no_grad()
def linearized_kl(
    model: LoadedModel,
    mix: Mapping[str, str],
    data: Data,
    *,
    rows: Sequence[int] | None = None,
    rounding: str = "searched",
    activations: ActivationRanges | None = None,
    batch: int = 4,
    track: Track,
    stage: str = "linearize",
    how: str = FORWARD,
) -> Linearized:
    """Predict the KL of a mix by linear logits, and measure it on the same examples.

        t = sum over layers of J_l dW_l + J_a da,    KL(softmax(z) || softmax(z + t))

    dW is what `applied` changes the weights by, so it includes every rounding of a checkpoint. For
    formats that round inputs, da is what rounding changes a layer's input by in the original model;
    its tangent is added to that of the input. Takes about six forward passes over the examples, a
    dual one counting as three, and two copies of the layers that the mix quantizes, three for a
    moment. The model is restored bit for bit, also when something raises.

    Args:
        model: the original.
        mix: layer -> format.
        data: sequences or labelled examples.
        rows: which of them; by default those withheld from choosing.
        rounding: as in the run that chose.
        activations: ranges of the layers' inputs, for formats that round them.
        batch: examples that go through the model together.
        track: shows progress over batches.
        stage: the name that progress is shown under.
        how: `forward`, where an operator without a forward derivative leads to differences of the
            outputs, [z(W + e dW) - z(W - e dW)] / 2e, and the record says so; or `difference`, to
            have those at once. The step is e = cbrt(eps) |w| / |dW|, at which truncation and
            rounding are alike, or an eighth of it and a 64th where e and 2e disagree by a percent,
            as they do about the kinks of ReLU.

    Raises:
        InputError: fewer than two examples, an unknown `how`, or as `applied`.
        Unsupported: a module is in training mode, or a layer's input cannot be rounded.
        NumericalError: the derivative is not finite, or depends on the step of the difference.
    """
    if how not in (FORWARD, DIFFERENCE):
        raise InputError(f"how: got {how!r}; allowed are {FORWARD} and {DIFFERENCE}.")
    rows = withheld_rows(data) if rows is None else list(rows)
    if len(rows) < 2:
        raise InputError(
            f"{data.facts.source}: {len(rows)} examples to linearize on; a figure with a standard "
            "error needs two. Withhold some from choosing (withheld=), or pass rows=."
        )
    refuse_training_mode(model.module)
    parts = [data.micro_batch(rows[i : i + batch]) for i in range(0, len(rows), batch)]
    sums = np.zeros((len(data), len(_COLUMNS)))
    with (
        applied(model, mix, rounding=rounding, activations=activations) as switch,
        differentiable(model.module, Parameters((), ())),
        torch.no_grad(),
    ):
        derivative = Derivative(
            model, _errors(model, mix, switch), _roundings(model, mix, activations), how
        )
        for part in track(parts, stage, len(parts)):
            z, t = derivative.at(part)
            s = derivative.parabola(part, z)
            switch.quantized()
            changed = counted_logits(model.module, part, model.device)
            switch.original()
            sequence = part.index[:, None].expand_as(part.predicts)[part.predicts].numpy()
            np.add.at(sums, sequence, _losses(z, t, changed, s))
    return _summarized(
        sums[rows],
        data.document.numpy()[rows].astype(np.int64),
        derivative.how,
        derivative.reason,
        s is not None,
    )


def withheld_rows(data: Data) -> list[int]:
    """Return the examples that were withheld from choosing."""
    return [int(row) for row in np.flatnonzero(data.withheld.numpy())]


def _errors(model: LoadedModel, mix: Mapping[str, str], switch: Switch) -> dict[str, Tensor]:
    """Return parameter name -> dW in the parameter's shape, and leave the model as it was."""
    names = [name for name, text in mix.items() if parse_format(text).quantizes]
    rounded = {name: model.parameter(name).data for name in names}
    switch.original()
    return {f"{name}.weight": rounded[name] - model.parameter(name).data for name in names}


def _roundings(
    model: LoadedModel, mix: Mapping[str, str], ranges: ActivationRanges | None
) -> list[Rounding]:
    """Return all modules whose inputs the mix rounds."""
    found: list[Rounding] = []
    for layer in model.layers:
        bits = parse_format(mix.get(layer.name, "none")).activation_bits
        if bits is None or ranges is None:  # refused already if they are missing
            continue
        found += [
            (layer.name, module, input_quantizer(ranges, layer.name, module, bits))
            for module in input_modules(model.module, layer)
        ]
    return found


def _losses(z: Tensor, t: Tensor, changed: Tensor, s: Tensor | None) -> Floats:
    """Return (n, 5) the columns of each prediction, computed in float64, some rows at a time.

    Without a parabola its column is zero.
    """
    made = []
    for start in range(0, len(z), ROWS):
        some = slice(start, start + ROWS)
        wide, tangent = z[some].double(), t[some].double()
        log_p = wide.log_softmax(-1)
        p = log_p.exp()
        centered = tangent - (p * tangent).sum(-1, keepdim=True)
        quadratic = 0.5 * (p * centered.square()).sum(-1)
        others = [wide + tangent, changed[some].double()]
        others += [] if s is None else [wide + s[some].double()]
        kl = [(p * (log_p - other.log_softmax(-1))).sum(-1) for other in others]
        kl += [torch.zeros_like(kl[0])] if s is None else []
        made.append(torch.stack([quadratic, *kl, torch.ones_like(quadratic)], -1))
    return torch.cat(made).cpu().numpy()


def _summarized(
    sums: Floats, document: Integers, how: str, reason: str, parabola: bool
) -> Linearized:
    """Return the means and their paired errors; with one document, over its sequences."""
    if not np.isfinite(sums).all():
        raise NumericalError(
            "logits of the original, of the mix, or their derivative hold NaN or infinity; load "
            "the model in a wider dtype if its values overflow."
        )
    clusters = document if len(np.unique(document)) > 1 else np.arange(len(document))
    of = {name: cluster_sums(sums[:, i], clusters) for i, name in enumerate(_COLUMNS)}

    def means(s: Mapping[str, Floats]) -> Floats:
        q, kl, measured, parabolic = (s[name] / s["count"] for name in _COLUMNS[:4])
        return np.stack([q, kl, measured, parabolic, kl - q, measured - kl], -1)

    value, stderr = jackknife(means, of)
    names = ("quadratic", "kl", "measured", "parabolic", "softmax", "network")
    found: dict[str, float | None] = dict(zip(names, value.tolist(), strict=True))
    found |= {f"{n}_stderr": e for n, e in zip(names, stderr.tolist(), strict=True)}
    found["ratio"], found["ratio_stderr"] = _over_measured(of, "kl")
    found["parabolic_ratio"], found["parabolic_ratio_stderr"] = _over_measured(of, "parabolic")
    if not parabola:
        found |= {name: None for name in found if name.startswith("parabolic")}
    return Linearized(
        **found,  # type: ignore[arg-type]
        sequences=len(sums),
        counted=int(sums[:, -1].sum()),
        how=how,
        reason=reason,
    )


def _over_measured(of: Mapping[str, Floats], name: str) -> tuple[float | None, float | None]:
    """Return a ratio and its error; none where some replicate of what is measured is zero."""
    if not bool((of["measured"].sum() - of["measured"] > 0).all()):
        return None, None
    value, stderr = jackknife(lambda s: s[name] / s["measured"], of)
    return float(value), float(stderr)
