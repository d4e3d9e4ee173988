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
from hawqkit.sensitivity.probing import ProbeSettings, probe

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


def raw(parts, name):
    return np.concatenate([part[name] for part in parts])


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_splitting_batches_and_padding_change_no_number(name):
    build, tolerance = MODELS[name]
    batches = pico.sequences(6, 14, ragged=True)
    together = measured(build(), batches, size=6)[3]
    apart = measured(build(), batches, size=1)[3]
    labels = together[0]["labels"]
    for row, part in enumerate(apart):  # alone, a sequence has no padding
        length = part["labels"].shape[1]
        np.testing.assert_array_equal(part["labels"][0], labels[row, :length])
    for key in ("count", "squared_gradient", "directional", "token_norm", "token", "token_summed"):
        whole, single = raw(together, key), raw(apart, key)
        scale = float(np.abs(whole).mean())
        np.testing.assert_allclose(single, whole, rtol=tolerance, atol=tolerance * scale)


def test_checkpointing_gives_equal_numbers_and_restores_the_model():
    module = pico.llama()
    batches = pico.sequences(4, 16)
    plain = measured(module, batches, size=2)[3]
    saved = measured(module, batches, size=2, checkpointing=True)[3]
    for key in ("squared_gradient", "directional", "token", "gram"):
        np.testing.assert_array_equal(raw(saved, key), raw(plain, key))
    assert not any(m.training for m in module.modules())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in module.modules())


def test_the_token_sums_equal_loops_over_tokens():
    module = pico.llama(dtype=torch.float64)
    batches = pico.sequences(1, 9)
    inputs, outputs = {}, {}
    model, errors, weights, (found,) = measured(module, batches)
    layer = next(x for x in model.layers if x.name.endswith("down_proj"))
    index = model.layers.index(layer)

    def keep(_, given, made):
        inputs["a"], outputs["z"] = given[0].detach(), made.requires_grad_()

    handle = module.get_submodule(layer.name).register_forward_hook(keep)
    labels = torch.from_numpy(found["labels"])
    logits = module(input_ids=batches.tokens).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum", ignore_index=-1)
    (d,) = torch.autograd.grad(loss, outputs["z"])
    handle.remove()
    made = {
        f: dense_error(errors[layer.name], weights[layer.name], i) for i, f in enumerate(FORMATS)
    }
    norm, terms = oracles.token_terms(inputs["a"][0], d[0], made)
    np.testing.assert_allclose(found["token_norm"][0, index], norm, rtol=1e-6)
    for column, name in enumerate(FORMATS):
        got = (found["token"][0, index, column], found["token_summed"][0, index, column])
        np.testing.assert_allclose(got, terms[name], rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_traces_and_quadratic_forms_are_unbiased_for_the_dense_matrix(name):
    module = MODELS[name][0]()
    batches = pico.sequences(3, 8, ragged=True)
    chosen = {
        "gpt2": ["transformer.h.0.attn.c_proj"],
        "llama-tied": ["model.layers.1.self_attn.k_proj"],
    }
    seeds = 300
    parts = [measured(module, batches, seed=s, positions=0) for s in range(seeds)]
    model, errors, weights, _ = parts[0]
    lengths = batches.attention.sum(1).tolist()
    for layer_name in chosen[name]:
        layer = next(x for x in model.layers if x.name == layer_name)
        i = model.layers.index(layer)
        g = oracles.gauss_newton(
            module, f"{layer_name}.weight", batches.tokens, batches.counted, lengths
        )
        n = float(parts[0][3][0]["count"].sum())
        traces = np.array([p[3][0]["squared_gradient"][:, i].sum() / n for p in parts])
        stderr = traces.std(ddof=1) / seeds**0.5
        assert abs(traces.mean() - float(g.trace())) < 4 * stderr
        for column in range(len(FORMATS)):
            error = dense_error(errors[layer_name], weights[layer_name], column)
            error = (error.T if layer.kind == "conv1d" else error).flatten()
            forms = np.array([(p[3][0]["directional"][:, i, column] ** 2).sum() / n for p in parts])
            stderr = forms.std(ddof=1) / seeds**0.5
            assert abs(forms.mean() - float(error @ g @ error)) < 4 * stderr


def test_the_cache_changes_no_number():
    module, batches = pico.llama(), pico.sequences(4, 12)
    model = wrap_model(module, name="pico")
    tables = [
        probe(model, batches, FORMATS, settings=ProbeSettings(cache=c)) for c in ("codes", "none")
    ]
    assert tables[0] == tables[1]
    np.testing.assert_array_equal(tables[0].samples.token, tables[1].samples.token)
