"""What tuning does to a network, against plain torch where that can say it too."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from torch import Tensor, nn
from tuning_cases import allocation_of, ranges_of, small_data, small_model, uniform

import hawqkit as hk
from hawqkit.errors import DataError, InputError, NumericalError, StateMismatch
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.apply import applied
from hawqkit.quantize.rounding import quantize_weight, scales_of
from hawqkit.tuning.order import Order
from hawqkit.tuning.settings import Distillation, TuneSettings, rate

FAST = TuneSettings(epochs=4, batch=16, learning_rate=3e-3)


def accuracy(model: LoadedModel, data, mix, activations=None) -> float:
    (images,) = data.inputs.values()
    with applied(model, mix, activations=activations), torch.no_grad():
        return float((model.module(images).argmax(-1) == data.labels).float().mean())


def loss_of(model: LoadedModel, data) -> float:
    (images,) = data.inputs.values()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model.module(images), data.labels))


def test_tuning_wins_back_what_rounding_lost_and_leaves_the_original_alone() -> None:
    model, data, held_out = small_model(), small_data(192), small_data(128, seed=9)
    before = {n: t.clone() for n, t in model.module.state_dict().items()}
    ranges = ranges_of(model, data, 3)
    mix = uniform(model, "w2a3")
    for learned in ("none", "both"):
        tuned = hk.tune(
            model, mix, data, activations=ranges, settings=replace(FAST, learned_scales=learned)
        )
        lost = accuracy(model, held_out, mix, ranges)
        won = accuracy(tuned.model, held_out, mix, tuned.activations)
        assert won > lost + 0.05
        curve = tuned.record.curve.loss
        assert np.mean(curve[-8:]) < np.mean(curve[:8])
        assert len(curve) == tuned.record.steps == 4 * 192 / 16
    assert all(torch.equal(t, model.module.state_dict()[n]) for n, t in before.items())
    assert type(tuned.model.module) is type(model.module)
    assert list(tuned.model.module.state_dict()) == list(before)
    assert not any(p.requires_grad for p in tuned.model.module.parameters())
    assert tuned.model.facts.hash != model.facts.hash
    assert replace(tuned.model.facts, hash="") == replace(model.facts, hash="")


@pytest.mark.parametrize("learned", ["none", "weights"])
@pytest.mark.parametrize("format", ["int2-channel", "int3-channel-asym", "int4-channel"])
def test_tuned_weights_are_exactly_what_the_mix_decodes_to(format: str, learned: str) -> None:
    model, data = small_model(steps=20), small_data()
    mix = {**uniform(model, format), "head": "none"}
    tuned = hk.tune(model, mix, data, settings=replace(FAST, epochs=1, learned_scales=learned))
    loose = tuned.unrounded_model()
    for name in ("conv1", "conv2"):
        known = tuned.model.scales[name]
        values = tuned.model.weight(name).clone()
        zeros = 0 if known.zeros is None else known.zeros.float()
        codes = values / known.scales.float() + zeros
        low = -(1 << (hk_bits(format) - 1))
        assert torch.equal(codes.round().clamp(low, -low - 1), codes.round())
        assert torch.equal((codes.round() - zeros) * known.scales.float(), values)
        assert not torch.equal(loose.weight(name), values)
        with applied(tuned.model, mix):
            assert torch.equal(tuned.model.weight(name), values)
        if learned == "none":
            scales, _ = scales_of(
                loose.weight(name), parse(format), rounding="searched", scale_dtype=torch.bfloat16
            )
            assert torch.equal(scales, known.scales)
            with applied(loose, mix):
                assert torch.equal(loose.weight(name), values)
    assert "head" not in tuned.model.scales
    assert not torch.equal(tuned.model.weight("head"), model.weight("head"))


def parse(name: str):
    from hawqkit.formats import parse_format

    return parse_format(name)


def hk_bits(name: str) -> int:
    return parse(name).bits


def plain_training(model: LoadedModel, data, rows: list[list[int]], rates: list[float]) -> Tensor:
    """Train by hand with `w + (q - w).detach()`: straight through, since nothing is clipped."""
    net = copy.deepcopy(model.module).requires_grad_(True)
    names = [layer.name for layer in model.layers]
    masters = {n: net.get_submodule(n).weight for n in names}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    (images,) = data.inputs.values()
    for some, learning_rate in zip(rows, rates, strict=True):
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        replaced = {}
        for name, master in masters.items():
            flat = master.detach().reshape(len(master), -1)
            made = quantize_weight(
                flat, parse("int8-channel-asym"), rounding="nearest", scale_dtype=torch.bfloat16
            )
            codes = made.codes.double() - made.zeros.double()
            values = (codes * made.scales.double()).reshape(master.shape)
            replaced[f"{name}.weight"] = master + (values - master).detach()
        logits = torch.func.functional_call(net, replaced, (images[some],))
        nn.functional.cross_entropy(logits, data.labels[some]).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_steps_are_those_of_plain_torch() -> None:
    model, data = small_model(dtype=torch.float64), small_data(40)
    data = replace(data, inputs={k: v.double() for k, v in data.inputs.items()})
    settings = TuneSettings(
        steps=6, batch=16, optimizer="sgd", learning_rate=0.05, schedule="cosine", warmup=0.4
    )
    tuned = hk.tune(
        model, uniform(model, "int8-channel-asym"), data, settings=settings, rounding="nearest"
    )
    order = Order(range(40), batch=16, seed=0)
    wanted = plain_training(
        model, data, [order(k) for k in range(6)], [rate(settings, k, 6) for k in range(6)]
    )
    found = tuned.unrounded_model().module
    got = torch.cat([p.detach().flatten() for p in found.parameters()])
    moved = (wanted - torch.cat([p.flatten() for p in model.module.parameters()])).abs().max()
    assert float((got - wanted).abs().max()) < 1e-9 * float(moved)


def test_micro_batches_change_nothing_but_rounding() -> None:
    model, data = small_model(dtype=torch.float64), small_data(48)
    data = replace(data, inputs={k: v.double() for k, v in data.inputs.items()})
    mix = uniform(model, "int4-channel")
    settings = replace(FAST, epochs=1, clip=0.5, distillation=Distillation(0.3, 4.0))
    whole = hk.tune(model, mix, data, settings=settings)
    parts = hk.tune(model, mix, data, settings=replace(settings, micro_batch=5))
    np.testing.assert_allclose(parts.record.curve.loss, whole.record.curve.loss, rtol=1e-9)
    assert whole.record.fingerprint != parts.record.fingerprint


def test_distillation_brings_the_mix_nearer_to_the_original() -> None:
    model, data, held_out = small_model(), small_data(256), small_data(128, seed=5)
    allocation = allocation_of(model, uniform(model, "int2-channel"))
    settings = replace(FAST, distillation=Distillation(1.0, 2.0), learned_scales="weights")
    tuned = hk.tune(model, allocation, data, settings=settings, held_out={"held-out": held_out})
    seen = tuned.record.validation
    before, after = (m.measured["held-out"] for m in seen.mixes)
    assert [m.name for m in seen.mixes] == ["chosen", "tuned"]
    assert after.kl < 0.5 * before.kl
    assert after.difference == pytest.approx(after.kl - before.kl)
    again = hk.validate(model, allocation, held_out, tuned=tuned)
    assert again.mixes[-1].measured["held-out"] == after
    assert tuned.allocation.model == tuned.model.facts.hash
    assert tuned.record.learned[0].change != 0


def test_clipping_bounds_the_step() -> None:
    model, data = small_model(), small_data()
    mix = uniform(model, "int8-channel")
    settings = TuneSettings(
        steps=1, batch=16, optimizer="sgd", learning_rate=1.0, schedule="constant", warmup=0
    )
    for clip in (None, 1e-3):
        tuned = hk.tune(model, mix, data, settings=replace(settings, clip=clip))
        now = tuned.unrounded_model().module.parameters()
        change = math.sqrt(
            sum(
                float((a - b).double().square().sum())
                for a, b in zip(now, model.module.parameters(), strict=True)
            )
        )
        wanted = clip or tuned.record.curve.gradient_norm[0]
        assert change == pytest.approx(wanted, rel=1e-3)


def test_language_models_and_text_classifiers_are_tuned_too() -> None:
    text = pico.sequences(8, 16, ragged=True, withheld=2)
    llama = hk.wrap_model(pico.llama(tied=True), name="llama")
    mix = {layer.name: "int3-g32" for layer in llama.layers}
    settings = TuneSettings(epochs=6, batch=4, learning_rate=2e-3, distillation=Distillation(1.0))
    tuned = hk.tune(llama, mix, text, settings=settings)
    assert tuned.record.examples == 6
    assert tuned.record.curve.loss[-1] < 0.7 * tuned.record.curve.loss[0]
    module = tuned.model.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    bert = hk.wrap_model(pico.text_classifier(), name="bert")
    tokens = pico.sequences(32, 12, ragged=True)
    inputs = {"input_ids": tokens.tokens, "attention_mask": tokens.attention.long()}
    labels = tokens.tokens[:, 0] % 3
    data = hk.make_examples(inputs, labels, classes=3)
    mix = {layer.name: "int4-channel" for layer in bert.layers}
    settings = TuneSettings(epochs=10, batch=16, learning_rate=3e-3, learned_scales="weights")
    tuned = hk.tune(bert, mix, data, settings=settings)
    assert tuned.record.curve.loss[-1] < tuned.record.curve.loss[0]


def test_a_bfloat16_model_is_trained_in_float32_and_given_back_in_bfloat16() -> None:
    model = hk.wrap_model(pico.llama(dtype=torch.bfloat16), name="llama")
    mix = {x.name: "int4-g32" for x in model.layers if x.kind == "linear"}
    tuned = hk.tune(model, mix, pico.sequences(4, 8), settings=TuneSettings(epochs=2, batch=4))
    assert {p.dtype for p in tuned.model.module.parameters()} == {torch.bfloat16}
    norm, before = (m.module.model.norm.weight for m in (tuned.model, model))
    embedding = tuned.model.module.model.embed_tokens.weight
    assert not torch.equal(embedding, model.module.model.embed_tokens.weight)
    assert norm.shape == before.shape
    with applied(tuned.model, mix), torch.no_grad():
        decoded = {n: tuned.model.parameter(n).clone() for n in mix}
    assert all(torch.equal(decoded[n], tuned.model.parameter(n)) for n in mix)


def test_frozen_batch_norm_keeps_its_statistics_but_not_its_weights() -> None:
    model, data = small_model(), small_data()
    tuned = hk.tune(model, uniform(model, "int4-channel"), data, settings=FAST)
    norm, before = tuned.model.module.norm1, model.module.norm1
    assert torch.equal(norm.running_mean, before.running_mean)
    assert torch.equal(norm.running_var, before.running_var)
    assert not torch.equal(norm.weight, before.weight)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    model, data = small_model(steps=20), small_data()
    settings = TuneSettings(
        steps=60, batch=16, optimizer="sgd", learning_rate=1e4, schedule="constant",
        warmup=0.99, checkpoint_every=2, learned_scales="weights",
    )  # fmt: skip
    with pytest.raises(NumericalError, match=r"at step \d+ the loss is .* training has diverged"):
        hk.tune(model, uniform(model, "int8-channel"), data, settings=settings, folder=tmp_path)
    kept = sorted((tmp_path / "checkpoints").glob("*.safetensors"))
    assert 1 <= len(kept) <= 2
    from hawqkit.store import read_arrays

    arrays, _ = read_arrays(kept[-1])
    assert all(np.isfinite(a).all() for a in arrays.values())
    assert not (tmp_path / "tuning.json").exists()


def test_what_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    model, data = small_model(steps=1), small_data()
    mix = uniform(model, "int4-channel")
    with pytest.raises(InputError, match=r"conv3.*Did you mean 'conv[12]'"):
        hk.tune(model, {**mix, "conv3": "int4-channel"}, data)
    with pytest.raises(InputError, match="the mix is a list"):
        hk.tune(model, ["int4-channel"], data)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="held_out is measured of an allocation"):
        hk.tune(model, mix, data, held_out={"held-out": data})
    strange = replace(allocation_of(model, mix), model="0" * 64)
    with pytest.raises(StateMismatch, match="of a model with hash 000000000000"):
        hk.tune(model, strange, data)
    other = ranges_of(small_model(seed=3, steps=1), data, 4)
    with pytest.raises(StateMismatch, match="observed in a model of hash"):
        hk.tune(model, uniform(model, "w4a4"), data, activations=other)
    with pytest.raises(InputError, match="brings its own activations"):
        hk.tune(model, allocation_of(model, mix), data, activations=other)
    alone = replace(data, withheld=torch.ones(len(data), dtype=torch.bool))
    with pytest.raises(DataError, match="all 64 examples of quarters are withheld"):
        hk.tune(model, mix, alone)
    wrong = replace(data, labels=data.labels + 2)
    with pytest.raises(DataError, match="labels lie outside the 4 classes"):
        hk.tune(model, mix, wrong)


def test_a_folder_holds_all_of_it_and_refuses_another_run(tmp_path: Path) -> None:
    model, data = small_model(), small_data()
    ranges = ranges_of(model, data, 4)
    allocation = allocation_of(model, uniform(model, "w3a4"), activations=ranges)
    settings = replace(FAST, epochs=1, learned_scales="both")
    tuned = hk.tune(
        model, allocation, data, settings=settings, folder=tmp_path, held_out={"held-out": data}
    )
    found = hk.load_tuned(tmp_path, model, allocation)
    assert (found.record, found.mix, found.taken) == (tuned.record, tuned.mix, True)
    assert found.activations == tuned.activations != ranges
    assert found.allocation == tuned.allocation
    state = tuned.model.module.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in found.model.module.state_dict().items())
    for name, known in tuned.model.scales.items():
        assert torch.equal(found.model.scales[name].scales, known.scales)
        assert torch.equal(found.unrounded[name], tuned.unrounded[name])
    again = hk.tune(
        model, allocation, data, settings=settings, folder=tmp_path, held_out={"held-out": data}
    )
    assert again.taken
    with pytest.raises(StateMismatch, match=r"settings.learning_rate: there 0.003, now 0.5") as no:
        hk.tune(model, allocation, data, settings=replace(settings, learning_rate=0.5),
                folder=tmp_path)  # fmt: skip
    assert f"remove {tmp_path} to tune anew" in str(no.value)
    with pytest.raises(StateMismatch, match="load the model that was tuned"):
        hk.load_tuned(tmp_path, small_model(seed=4, steps=1))
    other = replace(allocation, layers=uniform(model, "w2a4"))
    with pytest.raises(StateMismatch, match=r"tuned for another mix \(3 layers differ"):
        hk.load_tuned(tmp_path, model, other)


def test_a_damaged_result_is_made_again_from_the_last_checkpoint(tmp_path: Path) -> None:
    model, data = small_model(steps=20), small_data()
    mix = uniform(model, "int3-channel")
    first = hk.tune(model, mix, data, settings=FAST, folder=tmp_path)
    weights = tmp_path / "tuned" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    with pytest.raises(StateMismatch, match="damaged or mixed up"):
        hk.load_tuned(tmp_path, model)
    steps: list[int] = []

    def track(items, stage: str, total: int):
        steps.append(total)
        return items

    second = hk.tune(model, mix, data, settings=FAST, folder=tmp_path, track=track)
    assert (steps, second.taken) == ([0], False)
    assert second.record == first.record
    assert hk.load_tuned(tmp_path, model).model.facts.hash == first.model.facts.hash


def test_the_new_point_can_be_probed_and_its_own_formats_cost_nothing_there() -> None:
    model, data = small_model(), small_data(48, withheld=8)
    tuned = hk.tune(model, uniform(model, "int3-channel"), data, settings=replace(FAST, epochs=1))
    loose = hk.probe(tuned.unrounded_model(), data, ["int3-channel", "int8-channel"])
    found = hk.probe(tuned.model, data, ["int3-channel", "int8-channel"])
    assert found.model.hash == tuned.record.tuned
    assert max(row[0] for row in found.weight_error) == 0
    assert min(row[0] for row in loose.weight_error) > 0
