from __future__ import annotations

from typing import Any

import numpy as np
import pico
import pytest
import torch
from classifier_cases import case
from linearized_cases import (
    NoForward,
    cubes,
    llama,
    made,
    mix_of,
    plain,
    rounded_twice,
    rows_of_six,
    state_of,
)
from torch import Tensor, nn

import hawqkit as hk
from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.records import Linearized, Validation
from hawqkit.store import read_record, write_record
from hawqkit.validation.linearized import linearized_kl
from hawqkit.validation.measuring import measure_text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_operator_without_forward_derivative_leads_to_differences_and_is_told(
    dtype: torch.dtype,
) -> None:
    data = rows_of_six(dtype)
    known, unknown = cubes(False, dtype), cubes(True, dtype)
    mix = mix_of(known, "int3-channel")
    forward = linearized_kl(known, mix, data, track=plain)
    found = linearized_kl(unknown, mix, data, track=plain)
    assert (forward.how, forward.reason) == ("forward", "")
    assert found.how == "difference"
    assert "jvp" in found.reason
    # Truncation is about cbrt(eps)^2, 2.4e-5 in float32, and rounding no more.
    assert found.kl == pytest.approx(forward.kl, rel=1e-3 if dtype == torch.float32 else 1e-8)
    assert found.measured == pytest.approx(forward.measured, rel=1e-5)


def test_a_tangent_that_is_not_finite_leads_to_differences() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second(h + torch.sqrt((h - h) ** 2))  # 0, with the derivative 0 * infinity

    module = Root()
    pico.fill(module, 4, scale=2.0)
    model = hk.wrap_model(module.double(), name="root")
    found = linearized_kl(
        model, mix_of(model, "int3-channel"), rows_of_six(torch.float64), track=plain
    )
    assert found.how == "difference"
    assert "not finite" in found.reason
    linear = nn.Sequential(module.first, module.second).eval()
    same = hk.wrap_model(linear, name="same")
    wanted = linearized_kl(
        same, mix_of(same, "int3-channel"), rows_of_six(torch.float64), track=plain
    )
    assert found.kl == pytest.approx(wanted.kl, rel=1e-8)


def test_outputs_that_jump_have_no_derivative_and_are_refused() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.own = nn.Linear(6, 5), nn.Linear(5, 4), True

        def forward(self, x: Tensor) -> Tensor:
            h = NoForward.apply(self.first(x))
            return self.second(torch.round(h / 0.02))

    module = Steps()
    pico.fill(module, 4, scale=2.0)
    model = hk.wrap_model(module, name="steps")
    with pytest.raises(NumericalError, match=r"not smooth.*Forward mode: .*jvp"):
        linearized_kl(model, mix_of(model, "int3-channel"), rows_of_six(torch.float32), track=plain)


@pytest.mark.parametrize("how", ["forward", "difference"])
def test_the_model_comes_back_bit_for_bit_also_after_an_error(how: str) -> None:
    model, data, mix, ranges = rounded_twice("int4-channel-a4")
    before = state_of(model)
    wanted = [p.requires_grad for p in model.module.parameters()]
    linearized_kl(model, mix, data, activations=ranges, track=plain, how=how)
    assert state_of(model) == before

    calls = 0

    def fails(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ValueError("in the middle")

    handle = model.module.last.register_forward_hook(fails)
    with pytest.raises(ValueError, match="in the middle"):
        linearized_kl(model, mix, data, activations=ranges, batch=1, track=plain, how=how)
    handle.remove()
    assert calls == 3
    assert state_of(model) == before
    assert [p.requires_grad for p in model.module.parameters()] == wanted
    assert not any(child._forward_pre_hooks for child in model.module.modules())
    tied = llama()
    linearized_kl(tied, mix_of(tied, "int4-channel"), pico.sequences(3, 5, withheld=2), track=plain)
    assert tied.module.lm_head.weight is tied.module.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["cnn", "llama"])
def test_batches_of_any_size_give_the_same_figures(kind: str) -> None:
    model, data, mix = made(kind)
    one, all_ = (linearized_kl(model, mix, data, batch=b, track=plain) for b in (1, 64))
    assert one.kl == pytest.approx(all_.kl, rel=1e-9)
    assert one.kl_stderr == pytest.approx(all_.kl_stderr, rel=1e-7)


def test_what_is_measured_beside_it_is_what_validation_measures_there() -> None:
    run = case()
    rows = np.flatnonzero(run.calibration.withheld.numpy()).tolist()
    _, results = measure_text(
        run.model, {"chosen": run.allocation.layers}, run.calibration,
        rounding=run.allocation.rounding, track=plain, rows=rows,
    )  # fmt: skip
    found = run.validation.mixes[0].linearized
    assert found is not None
    assert found.sequences == len(rows) == 16
    assert found.measured == pytest.approx(results["chosen"].kl.mean(), rel=1e-4)  # float32


def test_the_chosen_mix_of_a_validation_has_it_and_old_records_load(tmp_path: Any) -> None:
    run = case()
    mixes = run.validation.mixes
    assert len(mixes) > 1
    assert isinstance(mixes[0].linearized, Linearized)
    assert all(mix.linearized is None for mix in mixes[1:])
    path = write_record(tmp_path / "validation.json", run.validation)
    assert read_record(path, Validation) == run.validation
    import json

    content = json.loads(path.read_text())
    for mix in content["mixes"]:
        del mix["linearized"]
    path.write_text(json.dumps(content))
    assert all(mix.linearized is None for mix in read_record(path, Validation).mixes)


def test_language_models_have_it_where_sequences_were_withheld() -> None:
    model = hk.wrap_model(pico.llama(), name="llama")
    text = pico.sequences(8, 10, withheld=4)
    table = hk.probe(model, text, ["int4-channel", "int8-channel"])
    allocation = hk.allocate(table, average_bits=5, baselines=("uniform",), draws=0)
    validation = hk.validate(model, allocation, text, calibration=text)
    assert validation.calibration is None
    found = [mix.linearized for mix in validation.mixes]
    assert [f.counted for f in found if f is not None] == [4 * 9]
    assert hk.predict_linearized(model, allocation, text) == found[0]


def test_what_cannot_be_linearized_is_a_warning_of_the_validation() -> None:
    model = cubes(True, torch.bfloat16)
    data = rows_of_six(torch.float32)
    x = {"(first)": data.inputs["(first)"].to(torch.float32)}
    data = hk.make_examples(x, torch.zeros(9), classes=4, withheld=8)

    class Cast(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.round(x * 8).to(torch.bfloat16) / 8)

    model = hk.wrap_model(Cast(model.module), name="cast")
    float_model = cubes(False, torch.float32)
    table = hk.probe(float_model, data, ["int3-channel", "int8-channel"])
    allocation = hk.allocate(table, average_bits=5, baselines=(), draws=0)
    renamed = {f"inner.{name}": format for name, format in allocation.layers.items()}
    from dataclasses import replace

    validation = hk.validate(model, replace(allocation, layers=renamed), data, calibration=data)
    assert validation.mixes[0].linearized is None
    assert any("linear logits" in w and "too coarse" in w for w in validation.warnings)


def test_bad_input_is_refused_before_anything_is_run() -> None:
    model, data, mix = made("cnn")
    with pytest.raises(InputError, match="allowed are forward and difference"):
        linearized_kl(model, mix, data, track=plain, how="backward")
    with pytest.raises(InputError, match="needs two"):
        linearized_kl(model, mix, data, rows=[1], track=plain)
    with pytest.raises(InputError, match="is not among the"):
        linearized_kl(model, {"nowhere": "int4-channel"}, data, track=plain)
    model.module.train()
    with pytest.raises(Unsupported, match="training mode"):
        linearized_kl(model, mix, data, track=plain)
    model.module.eval()


def test_half_precision_has_no_parabola() -> None:
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
    data = hk.make_examples({"x": x}, torch.zeros(9), classes=4, withheld=8)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.to(torch.bfloat16))

    module = Half()
    pico.fill(module, 4, scale=2.0)
    model = hk.wrap_model(module.to(torch.bfloat16), name="half")
    found = linearized_kl(model, mix_of(model, "int3-channel"), data, track=plain)
    assert found.how == "forward"
    assert found.kl == pytest.approx(found.measured, rel=0.05)  # logits of 8 bits
    told = (found.parabolic, found.parabolic_stderr, found.parabolic_ratio)
    assert (*told, found.parabolic_ratio_stderr) == (None, None, None, None)


def test_a_mix_that_changes_nothing_loses_nothing_and_has_no_ratio() -> None:
    model, data, mix = made("cnn")
    found = linearized_kl(model, dict.fromkeys(mix, "none"), data, track=plain)
    assert (found.kl, found.quadratic, found.measured) == (0, 0, 0)
    assert found.ratio is None
    assert found.ratio_stderr is None
    assert (found.parabolic, found.parabolic_ratio) == (0, None)
