from __future__ import annotations

import pico
import pytest
import torch
from torch import Tensor

from hawqkit.errors import InputError, NumericalError
from hawqkit.formats import parse_format
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.quantize.apply import Switch, applied, apply_
from hawqkit.quantize.rounding import dequantize, quantize_weight, scale_dtype_for

LLAMA = {
    "model.embed_tokens": "int8-g32",
    "model.layers.0.mlp.up_proj": "int2-g32",
    "model.layers.1.self_attn.q_proj": "int4-g64-asym",
    "model.layers.1.mlp.down_proj": "none",
}
GPT2 = {"transformer.h.0.attn.c_attn": "int3-g64", "transformer.h.1.mlp.c_proj": "int4-g128"}


def snapshot(model: LoadedModel) -> dict[str, tuple[int, Tensor]]:
    """Address and bits of every parameter."""
    return {
        name: (p.data_ptr(), p.detach().clone())
        for name, p in model.module.named_parameters(remove_duplicate=False)
    }


def assert_restored(model: LoadedModel, before: dict[str, tuple[int, Tensor]]) -> None:
    after = snapshot(model)
    assert list(after) == list(before)
    for name, (address, values) in before.items():
        assert after[name][0] == address, name
        assert torch.equal(after[name][1].view(torch.uint8), values.view(torch.uint8)), name


def expected(model: LoadedModel, name: str, format_name: str, rounding: str) -> Tensor:
    layer = next(x for x in model.layers if x.name == name)
    format_ = parse_format(format_name)
    quantized = quantize_weight(
        model.weight(name), format_, rounding=rounding, scale_dtype=scale_dtype_for(layer.dtype)
    )
    dtype = model.weight(name).dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dequantize(quantized, format_, wide).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mix_holds_the_dequantized_weights_and_then_the_original_bits(
    family: str, dtype: torch.dtype
) -> None:
    module = pico.llama(tied=True, dtype=dtype) if family == "llama" else pico.gpt2(dtype=dtype)
    model = wrap_model(module, name="pico")
    mix = LLAMA if family == "llama" else GPT2
    quantizing = {n: f for n, f in mix.items() if f != "none"}
    for rounding in ("nearest", "searched"):
        before = snapshot(model)
        wanted = {n: expected(model, n, f, rounding) for n, f in quantizing.items()}
        with applied(model, mix, rounding=rounding):
            for name, values in wanted.items():
                assert torch.equal(model.weight(name), values), name
                assert not torch.equal(before[f"{name}.weight"][1], model.parameter(name))
            untouched = set(before) - {f"{n}.weight" for n in quantizing} - {"lm_head.weight"}
            for name in untouched:
                assert model.module.get_parameter(name).data_ptr() == before[name][0]
        assert_restored(model, before)


def test_the_original_comes_back_when_something_raises_and_the_copy_was_written_to() -> None:
    model = wrap_model(pico.llama(), name="pico")
    before = snapshot(model)

    def fail() -> None:
        with applied(model, LLAMA):
            model.parameter("model.layers.0.mlp.up_proj").zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert_restored(model, before)


def test_tied_weights_stay_tied_in_both_states() -> None:
    model = wrap_model(pico.llama(tied=True), name="pico")
    module = model.module
    with applied(model, LLAMA) as switch:
        assert module.lm_head.weight is module.model.embed_tokens.weight
        changed = module.lm_head.weight.detach().clone()
        switch.original()
        assert module.lm_head.weight is module.model.embed_tokens.weight
        assert not torch.equal(module.lm_head.weight, changed)


def test_switching_back_and_forth_gives_the_same_logits_each_time() -> None:
    model = wrap_model(pico.llama(), name="pico")
    tokens = pico.sequences(2, 12).tokens

    def logits() -> Tensor:
        with torch.no_grad():
            return model.module(input_ids=tokens).logits

    before = snapshot(model)
    original = logits()
    switch = Switch(model, LLAMA)
    assert_restored(model, before)  # making a switch changes nothing
    switch.quantized()
    mixed = logits()
    assert float((mixed - original).abs().max()) > 1e-2
    for _ in range(2):
        switch.original()
        assert torch.equal(logits(), original)
        switch.quantized()
        assert torch.equal(logits(), mixed)
    switch.quantized()
    switch.original()
    assert_restored(model, before)


def test_apply_for_good_keeps_the_mix() -> None:
    model = wrap_model(pico.gpt2(), name="pico")
    wanted = {n: expected(model, n, f, "searched") for n, f in GPT2.items()}
    apply_(model, GPT2)
    for name, values in wanted.items():
        assert torch.equal(model.weight(name), values)


def test_every_problem_of_a_mix_is_named_and_nothing_is_changed() -> None:
    model = wrap_model(pico.llama(), name="pico")
    before = snapshot(model)
    mix = {
        "model.layers.0.mlp.up_porj": "int4-g64",
        "model.layers.0.mlp.up_proj": "int4-g128",
        "model.layers.1.mlp.up_proj": "int4-g46",
    }
    with pytest.raises(InputError) as caught, applied(model, mix):
        pass
    text = str(caught.value)
    assert "Did you mean 'model.layers.0.mlp.up_proj'" in text
    assert "64 columns" in text
    assert "Did you mean 'int4-g64'" in text
    assert_restored(model, before)


def test_a_weight_with_nan_is_refused_by_its_layer_and_nothing_is_changed() -> None:
    model = wrap_model(pico.llama(), name="pico")
    model.parameter("model.layers.1.self_attn.q_proj")[4, 2] = torch.nan
    before = snapshot(model)
    with pytest.raises(NumericalError, match=r"layers\.1\.self_attn\.q_proj.*row 4, column 2"):
        apply_(model, LLAMA)
    assert_restored(model, before)
