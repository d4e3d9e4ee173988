"""A model computed in bfloat16: what is counted, how close the numbers come, how sums are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from command_line import RECIPE, succeed

from hawqkit.models import wrap_model
from hawqkit.records import Allocation, Sensitivities, Validation, to_array
from hawqkit.sensitivity.probing import Prober, ProbeSettings
from hawqkit.store import read_record, read_samples

FORMATS = ["int3-g32", "int4-g32", "int8-g32", "none"]
CHANGES = {
    "sequences: 4, length: 32, withheld: 2": "sequences: 16, length: 64, withheld: 4",
    "int8-g32]": "int8-g32, none]",
    "average_bits: 4.5": "average_bits: 6",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run one bfloat16 checkpoint, computed in either dtype; `wide` is stored in float32."""
    home = tmp_path_factory.mktemp("dtypes")
    pico.save(home / "model", pico.llama(dtype=torch.bfloat16))
    pico.save(home / "wide", pico.llama(dtype=torch.float32))
    recipe = RECIPE
    for old, new in CHANGES.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    (home / "r.yaml").write_text(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for dtype in ("float32", "bfloat16"):
            succeed("run", "r.yaml", "-o", dtype, "--set", f"model.dtype={dtype}")
        narrowed = ["--set", "model.dtype=bfloat16", "--set", "model.source=wide"]
        succeed("probe", "r.yaml", "-o", "narrowed", *narrowed)
    return {name: home / name for name in ("float32", "bfloat16", "narrowed")}


def table(folder: Path) -> Sensitivities:
    return read_record(folder / "sensitivities.json", Sensitivities)


def test_the_option_reaches_the_probe(runs: dict[str, Path]) -> None:
    for name, dtype in {**{n: n for n in ("float32", "bfloat16")}, "narrowed": "bfloat16"}.items():
        facts = json.loads((runs[name] / "probe" / "facts.json").read_text())
        assert facts["dtype"] == dtype


@pytest.mark.parametrize("name", ["float32", "bfloat16", "narrowed"])
def test_bits_are_those_of_what_is_stored(runs: dict[str, Path], name: str) -> None:
    # A checkpoint in float32 that is loaded narrower counts as narrow: nothing wider is measured.
    assert {layer.dtype for layer in table(runs[name]).layers} == {"bfloat16"}


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_average_bits_count_kept_layers_with_sixteen(runs: dict[str, Path], name: str) -> None:
    allocation = read_record(runs[name] / "allocation.json", Allocation)
    bits = {"int3-g32": 3, "int4-g32": 4, "int8-g32": 8, "none": 16}
    # Scales are bfloat16 and one stands for 32 weights; a kept layer has none.
    stored = {f: b + (0 if f == "none" else 16 / 32) for f, b in bits.items()}
    layers = table(runs[name]).layers
    numel = sum(layer.rows * layer.columns for layer in layers)
    for found, counted in ((allocation.totals.average_bits, bits),
                           (allocation.totals.bits_per_weight, stored)):  # fmt: skip
        wanted = sum(x.rows * x.columns * counted[allocation.layers[x.name]] for x in layers)
        assert found == pytest.approx(wanted / numel, abs=1e-12)
    assert allocation.totals.average_bits <= 6


def test_the_errors_of_formats_are_the_same_numbers(runs: dict[str, Path]) -> None:
    # Equal stored weights give equal codes and scales: rounding computes in float32 in any case.
    one, other = (to_array(table(runs[n]).weight_error) for n in ("float32", "bfloat16"))
    assert np.array_equal(one, other)


def test_traces_and_token_scores_come_as_close_as_bfloat16_allows(runs: dict[str, Path]) -> None:
    """bfloat16 keeps 8 bits: each product and activation errs by up to 2^-9 = 0.2 %, at random.

    Through two blocks and back these add up to about 1 % of a gradient, 2 % of its square. Some
    labels that are drawn near a boundary flip besides (same uniform numbers, other probabilities).
    Measured: 1.4 % on average, 4 to 7 % at most; the bounds are twice that. A squared directional
    product can lie near zero, where a relative difference says nothing, so it is compared in units
    of its error.
    """
    one, other = (table(runs[n]) for n in ("float32", "bfloat16"))
    ratio = np.array(other.trace) / np.array(one.trace) - 1
    assert np.abs(ratio).max() < 0.08
    for name, worst in {"trace": 0.08, "token": 0.15, "shrunk": 0.1}.items():
        a, b = (to_array(t.scores[name].values)[:, :3] for t in (one, other))
        assert np.abs(b / a - 1).max() < worst, name
        assert np.abs(b / a - 1).mean() < 0.03, name
    for name in ("trace", "token", "token-summed", "directional", "shrunk"):
        a, b = (to_array(t.scores[name].values)[:, :3] for t in (one, other))
        stderr = to_array(one.scores[name].stderr)[:, :3]
        assert (np.abs(b - a) / stderr).max() < 2.5, name


def test_samples_are_wide(runs: dict[str, Path]) -> None:
    record = table(runs["bfloat16"])
    samples = read_samples(runs["bfloat16"] / "samples.safetensors", record.fingerprint)
    for name in ("squared_gradient", "directional", "token", "gram"):
        values = getattr(samples, name)
        assert values.dtype == np.float64
        assert np.isfinite(values).all()


def test_the_measured_loss_is_that_of_the_same_mix(runs: dict[str, Path]) -> None:
    # Same weights, same text; the KL's own rounding is a few per cent, as the sensitivities' is.
    kl = []
    for name in ("float32", "bfloat16"):
        mixes = read_record(runs[name] / "validation.json", Validation).mixes
        kl.append({mix.name: mix.measured["held-out"].kl for mix in mixes})
    assert kl[1]["uniform"] == pytest.approx(kl[0]["uniform"], rel=0.1)


def test_sums_over_tokens_and_weights_are_made_in_float32() -> None:
    """What autograd hands over in bfloat16 is summed like float64 would, to float32's rounding.

    Sums of 2,048 products in bfloat16 would be wrong by more than 1 %; float32 by less than 1e-5.
    """
    module = pico.llama(dtype=torch.bfloat16)
    model = wrap_model(module, name="pico", exclude=["lm_head"])
    settings = ProbeSettings(batch=3, cache="codes")
    prober = Prober(model, pico.sequences(3, 32), FORMATS[:2], settings)
    prober.prepare()
    seen: dict[str, list[torch.Tensor]] = {}
    with prober:
        for layer in prober.layers:
            if layer.kind == "linear":
                child = module.get_submodule(layer.name)
                child.register_forward_hook(keep(seen.setdefault(layer.name, [])))
        prober.measure(0)
    samples = prober.finish().samples
    assert samples is not None
    for index, layer in enumerate(prober.layers):
        if layer.kind != "linear":
            continue
        inputs, gradients = seen[layer.name]
        assert inputs.dtype == gradients.dtype == torch.bfloat16
        g = torch.einsum("bto,bti->boi", gradients.double(), inputs.double())  # (B, rows, columns)
        wanted = g.square().sum((1, 2)).numpy()
        np.testing.assert_allclose(samples.squared_gradient[:, index], wanted, rtol=1e-5)
        error = torch.empty(2, *g.shape[1:])
        prober.errors[layer.name].fill(model.weight(layer.name), error)
        product = torch.einsum("boi,foi->bf", g, error.double()).numpy()
        norm = np.sqrt(wanted)[:, None] * error.double().flatten(1).norm(dim=1).numpy()
        # A signed product cancels, so its rounding is measured against |g| |dW|.
        assert (np.abs(samples.directional[:, index] - product) / norm).max() < 1e-5


def keep(into: list[torch.Tensor]) -> Any:
    """Return a forward hook that keeps a module's input and, later, its output's gradient."""

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        into.append(inputs[0].detach())
        output.register_hook(into.append)

    return hook
