"""Grids of inputs, their calibration, and mixes that round them, against plain formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from torch import Tensor, nn

from hawqkit.errors import InputError, NumericalError, StateMismatch
from hawqkit.models.examples import make_examples
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.quantize.activations import calibrate_activations
from hawqkit.quantize.apply import Switch, applied, apply_
from hawqkit.quantize.input_rounding import fake_quantize, fake_quantize_tokens
from hawqkit.records import ActivationRanges, make_grid
from hawqkit.store import read_record, write_record


def draw(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- grids ---


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_grid_holds_zero_and_both_ends_within_a_step(bits: int, symmetric: bool) -> None:
    for low, high in ((-1.7, 3.1), (0.0, 2.5), (-4.0, 0.0), (0.5, 2.0), (-3.0, -1.0), (-1e-3, 9)):
        grid = make_grid(low, high, bits, symmetric=symmetric)
        levels = (np.arange(grid.largest + 1) - grid.zero) * grid.scale
        assert (levels == 0).any()
        assert float(np.float32(grid.scale)) == grid.scale
        assert levels[0] <= low + grid.scale * 0.51
        assert levels[-1] >= high - grid.scale * 0.51
        if symmetric and low < 0:
            assert levels[-1] == pytest.approx(max(-low, high), rel=1e-6)
            assert grid.zero == 2 ** (bits - 1)
        if low >= 0:
            assert grid.zero == 0  # no code is spent on what never comes


def test_an_empty_or_vanishing_range_has_a_scale_of_one() -> None:
    for low, high in ((0.0, 0.0), (-1e-60, 1e-60)):
        for symmetric in (False, True):
            assert make_grid(low, high, 4, symmetric=symmetric).scale == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rounding_takes_the_nearest_level_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    values = draw((7, 11)).to(dtype)
    grid = make_grid(-1.3, 2.1, 4)
    rounded = fake_quantize(values, grid.scale, grid.zero, 4)
    assert rounded.dtype == dtype
    levels = torch.tensor((np.arange(16) - grid.zero) * grid.scale)
    distance = (values.double().unsqueeze(-1) - levels).abs()
    nearest = distance.amin(-1)
    error = (rounded.double() - values.double()).abs()
    slack = 4 * torch.finfo(dtype).eps  # the level itself is rounded to the dtype
    assert float((error - nearest).abs().max()) <= slack
    assert fake_quantize(torch.zeros(3, dtype=dtype), grid.scale, grid.zero, 4).abs().sum() == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("features", [-1, 1])
def test_dynamic_rounding_is_static_rounding_token_by_token(features: int, symmetric: bool) -> None:
    values = draw((2, 5, 3))
    values[0, 1] = 0.0
    values[1, :, 2] = values[1, :, 2].abs()
    rounded = fake_quantize_tokens(values, 4, features=features, symmetric=symmetric)
    moved, wanted = values.movedim(features, -1), torch.empty_like(values).movedim(features, -1)
    for b, t in np.ndindex(*moved.shape[:2]):
        token = moved[b, t]
        low, high = float(token.min()), float(token.max())
        if symmetric:
            high = float(token.abs().max())
            low = -high
        grid = make_grid(low, high, 4, symmetric=symmetric)
        wanted[b, t] = fake_quantize(token, grid.scale, grid.zero, 4)
    torch.testing.assert_close(rounded, wanted.movedim(-1, features), rtol=1e-12, atol=0)


# --- calibration ---


class Twice(nn.Module):
    """A layer that is called twice, a tied pair, and a branch that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.mix = nn.Linear(6, 6)
        self.spare = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.embed(ids))
        return self.head(self.mix(5 * x).mean(1))


def twice() -> tuple[LoadedModel, Tensor]:
    net = Twice()
    pico.fill(net, 2)
    ids = torch.randint(0, 12, (10, 4), generator=torch.Generator().manual_seed(0))
    return wrap_model(net, name="twice"), ids


def inputs_of(model: LoadedModel, module: str, run) -> Tensor:
    kept: list[Tensor] = []
    child = model.module.get_submodule(module)
    handle = child.register_forward_pre_hook(lambda _, given: kept.append(given[0].flatten()))
    with torch.no_grad():
        run()
    handle.remove()
    return torch.cat(kept)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_range_is_over_all_calls_and_lookups_have_none(batch: int) -> None:
    model, ids = twice()
    data = make_examples({"ids": ids}, [0] * 10, classes=12, withheld=3)
    ranges = calibrate_activations(model, data, model.layers, [4, 8], batch=batch)
    seen = inputs_of(model, "mix", lambda: model.module(ids[:7]))
    mix = ranges.layers["mix"]
    assert mix.count == seen.numel() == 2 * 7 * 4 * 6
    np.testing.assert_allclose((mix.low, mix.high), (seen.min(), seen.max()), rtol=1e-6)
    assert ranges.bits == (8, 4)
    assert ranges.examples == 7  # those that only predict are not looked at
    tied = ranges.layers["embed"]  # the table's own lookup has no input; its use as head has one
    top = inputs_of(model, "head", lambda: model.module(ids[:7]))
    np.testing.assert_allclose((tied.low, tied.high), (top.min(), top.max()), rtol=1e-6)
    assert ranges.layers["spare"].count == 0
    assert any("spare" in w and "never called" in w for w in ranges.warnings)
    for observer in ("percentile", "mse", "entropy"):
        other = calibrate_activations(model, data, model.layers, [4], observer=observer)
        low, high = other.layers["mix"].ranges[4]
        assert seen.min() * 1.001 <= low < 0 < high <= seen.max() * 1.001


def test_padding_is_not_seen() -> None:
    model = wrap_model(pico.text_classifier(), name="pico")
    ids = torch.randint(8, 90, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    padded = make_examples({"input_ids": ids, "attention_mask": mask}, [0, 1, 2], classes=3)
    together = calibrate_activations(model, padded, model.layers, [8], batch=3)
    apart = calibrate_activations(model, padded, model.layers, [8], batch=1)
    name = "bert.encoder.layer.0.attention.self.query"
    for found in (together, apart):
        assert found.layers[name].count == 19 * 16
    for layer, found in together.layers.items():
        np.testing.assert_allclose(found.high, apart.layers[layer].high, rtol=1e-5)


def test_nan_in_an_input_names_the_layer() -> None:
    model, ids = twice()
    model.parameter("mix")[0, 0] = torch.inf
    data = make_examples({"ids": ids}, [0] * 10, classes=12)
    with pytest.raises(NumericalError, match="layer mix: of its inputs"):
        calibrate_activations(model, data, model.layers, [8])
    assert not model.module.mix._forward_pre_hooks


def test_wrong_settings_are_refused_together() -> None:
    model, ids = twice()
    data = make_examples({"ids": ids}, [0] * 10, classes=12)
    with pytest.raises(InputError) as caught:
        calibrate_activations(
            model, data, model.layers, [8], observer="minmax", mode="per-token", percentile=40.0
        )
    text = str(caught.value)
    assert "Did you mean 'min-max'?" in text
    assert "unknown mode 'per-token'" in text
    assert "percentile 40" in text
    with pytest.raises(InputError, match="bits 7"):
        calibrate_activations(model, data, model.layers, [7])
    with pytest.raises(InputError, match="bits are missing"):
        calibrate_activations(model, data, model.layers, [])


def test_ranges_are_written_and_read_again_and_damage_is_refused(tmp_path: Path) -> None:
    model, ids = twice()
    data = make_examples({"ids": ids}, [0] * 10, classes=12)
    for mode in ("static", "dynamic"):
        made = calibrate_activations(model, data, model.layers, [8, 3], observer="mse", mode=mode)
        path = write_record(tmp_path / "activations.json", made)
        assert read_record(path, ActivationRanges) == made
    assert made.layers == {}
    assert made.grid("mix", 3) is None
    path.write_text(path.read_text().replace('"dynamic"', '"sometimes"'))
    with pytest.raises(StateMismatch, match="sometimes"):
        read_record(path, ActivationRanges)


# --- in the model ---

MIX = {"mix": "w4a4", "embed": "int4-channel-a8", "spare": "none"}


def test_a_mix_rounds_the_inputs_and_is_taken_out_bit_for_bit() -> None:
    model, ids = twice()
    data = make_examples({"ids": ids}, [0] * 10, classes=12)
    ranges = calibrate_activations(model, data, model.layers, [8, 4])
    net = model.module
    with torch.no_grad():
        original = net(ids)
        switch = Switch(model, MIX, activations=ranges)
        assert torch.equal(net(ids), original)
        switch.quantized()
        switch.quantized()  # twice puts no hook in twice
        mixed = net(ids)
        grid = {n: ranges.grid(n, b) for n, b in (("mix", 4), ("embed", 8))}

        def rounded(x: Tensor, name: str, bits: int) -> Tensor:
            return fake_quantize(x, grid[name].scale, grid[name].zero, bits)

        x = nn.functional.embedding(ids, net.embed.weight)  # looked up: nothing to round
        for factor in (1, 5):
            x = rounded(factor * x, "mix", 4) @ net.mix.weight.T + net.mix.bias
        wanted = rounded(x.mean(1), "embed", 8) @ net.embed.weight.T
        torch.testing.assert_close(mixed, wanted, rtol=1e-5, atol=1e-6)
        switch.original()
        assert torch.equal(net(ids), original)
        assert not any(m._forward_pre_hooks for m in net.modules())

        def fail() -> None:
            with applied(model, MIX, activations=ranges):
                assert torch.equal(net(ids), mixed)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert torch.equal(net(ids), original)
        assert not any(m._forward_pre_hooks for m in net.modules())
        apply_(model, MIX, activations=ranges)
        assert torch.equal(net(ids), mixed)


def test_missing_ranges_are_named_and_nothing_is_changed() -> None:
    model, ids = twice()
    data = make_examples({"ids": ids}, [0] * 10, classes=12)
    with pytest.raises(InputError, match="no ranges came; pass activations="):
        Switch(model, MIX)
    some = [x for x in model.layers if x.name != "mix"]
    ranges = calibrate_activations(model, data, some, [8])
    with pytest.raises(InputError) as caught:
        Switch(model, {**MIX, "spare": "w4a2"}, activations=ranges)
    assert "'mix': its inputs are wanted in 4 bits, and ranges were made for 8" in str(caught.value)
    assert "'spare': its inputs are wanted in 2 bits" in str(caught.value)
    with pytest.raises(InputError, match="no range of its inputs is known"):
        Switch(model, {"mix": "w4a8"}, activations=ranges)
    foreign = ActivationRanges("other", "", "min-max", "dynamic", None, False, (8, 4), 0, {})
    with pytest.raises(StateMismatch, match="calibrate this model"):
        Switch(model, MIX, activations=foreign)
    plain = Switch(model, {"mix": "int4-channel"}, activations=foreign)  # they are not used
    plain.original()


def test_convolutions_round_each_pixel_over_its_channels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 2))
    pico.fill(net, 4)
    model = wrap_model(net, name="net")
    x = draw((2, 3, 3, 3), dtype=torch.float32)
    data = make_examples(x, [0, 1], classes=2)
    ranges = calibrate_activations(model, data, model.layers, [3], mode="dynamic")
    with torch.no_grad(), applied(model, {"0": "w8a3"}, activations=ranges):
        found = net(x)
        given = fake_quantize_tokens(x, 3, features=1)
        wanted = net[2](net[1](nn.functional.conv2d(given, net[0].weight, net[0].bias)))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
