"""The dual probe against plain autograd and dense float64 matrices."""

from __future__ import annotations

import numpy as np
import oracles
import pico
import pytest
import torch

from hawqkit.formats import parse_format
from hawqkit.models.model import wrap_model
from hawqkit.quantize.errors_of import make_errors
from hawqkit.sensitivity.dual_probe import DualProbe

FORMATS = ["int2-g32", "int4-g32-asym", "int8-channel"]

# transformers computes Llama's norms, rotary embedding and softmax in float32 whatever the dtype.
MODELS = {
    "gpt2": (lambda: pico.gpt2(dtype=torch.float64), 1e-10),
    "llama": (lambda: pico.llama(dtype=torch.float64), 1e-6),
    "llama-tied": (lambda: pico.llama(dtype=torch.float64, tied=True), 1e-6),
}


def measured(module, batches, *, size=3, positions=1000, seed=0, **options):
    model = wrap_model(module, name="pico")
    parsed = [parse_format(f) for f in FORMATS]
    weights = {x.name: model.weight(x.name) for x in model.layers}
    errors = {
        n: make_errors(w, parsed, rounding="searched", scale_dtype=torch.bfloat16, keep="codes")
        for n, w in weights.items()
    }
    with DualProbe(
        module,
        model.layers,
        weights,
        errors,
        formats=FORMATS,
        positions=positions,
        seed=seed,
        **options,
    ) as dual:
        return model, errors, weights, [dual.measure(b) for b in batches.micro_batches(size)]


def dense_error(errors, weight, column):
    out = torch.empty(len(FORMATS), *weight.shape, dtype=torch.float64)
    errors.fill(weight, out)
    return out[column]


@pytest.mark.parametrize("name", MODELS)
def test_every_sum_equals_plain_autograd_with_the_same_labels(name):
    build, tolerance = MODELS[name]
    module = build()
    batches = pico.sequences(3, 14, ragged=True)
    model, errors, weights, (found,) = measured(module, batches)
    labels = torch.from_numpy(found["labels"])
    gradients = oracles.sequence_gradients(
        module,
        [f"{x.name}.weight" for x in model.layers],
        batches.tokens,
        batches.attention,
        labels,
    )
    for i, layer in enumerate(model.layers):
        g = gradients[f"{layer.name}.weight"]
        g = g.transpose(1, 2) if layer.kind == "conv1d" else g
        flat = g.flatten(1)
        gram = flat @ flat.T
        scale = float(gram.diagonal().mean())
        np.testing.assert_allclose(
            found["squared_gradient"][:, i], gram.diagonal(), rtol=tolerance, atol=tolerance * scale
        )
        off = gram[np.triu_indices(3, 1)]
        np.testing.assert_allclose(found["gram"][:, i], off, rtol=0, atol=tolerance * scale)
        for column in range(len(FORMATS)):
            error = dense_error(errors[layer.name], weights[layer.name], column).flatten()
            size = float(error.norm()) * scale**0.5
            np.testing.assert_allclose(
                found["directional"][:, i, column], flat @ error, rtol=0, atol=tolerance * size
            )
