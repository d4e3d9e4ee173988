from __future__ import annotations

import pico
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hawqkit.errors import InputError
from hawqkit.models.layers import block_of, find_layers, matches
from hawqkit.models.model import wrap_model

LLAMA_BLOCK = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def names(layers):
    return [layer.name for layer in layers]


def reasons(skipped):
    return {s.name: s.reason for s in skipped}


def test_llama_layers_come_in_the_models_order_with_shapes_and_blocks():
    layers, skipped = find_layers(pico.llama())
    expected = [f"model.layers.{b}.{n}" for b in (0, 1) for n in LLAMA_BLOCK]
    assert names(layers) == ["model.embed_tokens", *expected, "lm_head"]
    by_name = {layer.name: layer for layer in layers}
    assert (by_name["model.layers.1.self_attn.k_proj"].rows, by_name["lm_head"].rows) == (32, 96)
    assert by_name["model.layers.1.mlp.down_proj"].columns == 128
    assert [layer.block for layer in layers] == [None, *[0] * 7, *[1] * 7, None]
    assert by_name["model.embed_tokens"].kind == "embedding"
    assert names(skipped) == ["(5 vectors)"]
    assert "5 norms" in skipped[0].reason


def test_every_parameter_is_accounted_for():
    for module in (pico.llama(), pico.llama(tied=True), pico.gpt2(), pico.mixtral()):
        layers, skipped = find_layers(module, exclude=["*.0.*"])
        counted = sum(x.numel for x in layers)
        counted += sum(int(torch.tensor(s.shape).prod()) for s in skipped)
        assert counted == sum(p.numel() for p in module.parameters())


def test_conv1d_counts_outputs_as_rows_and_positions_are_left_alone():
    layers, skipped = find_layers(pico.gpt2())
    attention = next(x for x in layers if x.name == "transformer.h.1.attn.c_attn")
    assert (attention.kind, attention.rows, attention.columns) == ("conv1d", 192, 64)
    assert attention.block == 1
    assert "position embedding" in reasons(skipped)["transformer.wpe"]


def test_naming_the_position_embedding_chooses_it():
    layers, _ = find_layers(pico.gpt2(), include=["transformer.wpe"])
    assert names(layers) == ["transformer.wpe"]


def test_tied_weight_is_one_layer_that_names_its_other_use():
    layers, _ = find_layers(pico.llama(tied=True))
    tied = [x for x in layers if x.tied]
    assert [(x.name, x.tied, x.calls) for x in tied] == [("model.embed_tokens", ("lm_head",), 2)]
    assert "lm_head" not in names(layers)


@pytest.mark.parametrize("pattern", ["lm_head", "model.embed_tokens", "*embed*"])
def test_excluding_any_use_of_a_tied_weight_excludes_it(pattern):
    layers, skipped = find_layers(pico.llama(tied=True), exclude=[pattern])
    assert len(layers) == 14
    reason = reasons(skipped)["model.embed_tokens"]
    assert f"excluded by pattern {pattern!r}" in reason
    assert ("tied to lm_head" in reason) == (pattern == "lm_head")


def test_including_one_use_of_a_tied_weight_chooses_it():
    layers, _ = find_layers(pico.llama(tied=True), include=["lm_head"])
    assert names(layers) == ["model.embed_tokens"]


def test_pattern_on_a_block_covers_all_inside_it():
    layers, skipped = find_layers(pico.llama(), include=["model.layers.1"])
    assert names(layers) == [f"model.layers.1.{n}" for n in LLAMA_BLOCK]
    assert "no include pattern matches" in reasons(skipped)["model.layers.0.mlp.up_proj"]


def test_patterns_are_globs_with_case():
    assert matches("model.layers.10.mlp.up_proj", "*.up_proj")
    assert not matches("model.layers.10.mlp.up_proj", "model.layers.1")
    assert not matches("lm_head", "LM_HEAD")
    assert block_of("encoder.blocks.12.attn") == 12
    assert block_of("model.norm") is None


def test_experts_routers_and_convolutions_carry_their_reasons():
    _, skipped = find_layers(pico.mixtral())
    found = reasons(skipped)
    experts = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts == "stack of 4 experts: not supported for causal language models yet"
    assert "MixtralTopKRouter" in found["model.layers.0.mlp.gate"]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    _, skipped = find_layers(net, convolutions=False)
    assert "Conv2d: not supported for causal language models yet" in reasons(skipped)["0"]


def test_projection_of_multihead_attention_is_left_alone_because_it_is_never_called():
    _, skipped = find_layers(nn.ModuleList([nn.MultiheadAttention(8, 2), nn.Linear(8, 8)]))
    assert "without calling its module" in reasons(skipped)["0.out_proj"]


def test_shared_module_is_one_layer():
    shared = nn.Linear(8, 8, bias=False)
    layers, _ = find_layers(nn.Sequential(shared, nn.ReLU(), shared))
    assert [(x.name, x.tied, x.calls) for x in layers] == [("0", ("2",), 2)]


def test_stored_dtype_wins_over_the_one_in_memory():
    layers, _ = find_layers(pico.llama(), stored={"lm_head.weight": "bfloat16"})
    assert {x.name: x.dtype for x in layers}["lm_head"] == "bfloat16"
    assert {x.name: x.dtype for x in layers}["model.embed_tokens"] == "float32"


@pytest.mark.parametrize("what", ["include", "exclude"])
def test_pattern_that_matches_nothing_is_an_error_with_near_names(what):
    options = {what: ["*", "lm_hed"]}
    message = rf"layers\.{what}: 'lm_hed' matches no module.*Did you mean 'lm_head'"
    with pytest.raises(InputError, match=message):
        find_layers(pico.llama(), **options)


def test_a_bare_module_is_its_own_layer():
    model = wrap_model(nn.Linear(4, 8), name="bare")
    assert [(x.name, x.rows, x.columns) for x in model.layers] == [("", 8, 4)]
    assert model.weight("").shape == (8, 4)


def test_nothing_left_is_an_error_that_names_patterns_and_weights():
    with pytest.raises(InputError, match=r"no layer matched.*exclude \['\*'\].*lm_head"):
        find_layers(pico.llama(), exclude=["*"])
    with pytest.raises(InputError, match="no Linear, Conv1D, Embedding or convolution"):
        find_layers(nn.LayerNorm(4))


def test_weight_is_a_view_in_outputs_by_inputs():
    model = wrap_model(pico.gpt2(), name="pico")
    view = model.weight("transformer.h.0.mlp.c_fc")
    stored = model.parameter("transformer.h.0.mlp.c_fc")
    assert view.shape == (256, 64)
    assert stored.shape == (64, 256)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    module = model.module.get_submodule("transformer.h.0.mlp.c_fc")
    assert isinstance(module, Conv1D)
    torch.testing.assert_close(module(x), x @ view.T + module.bias, rtol=1e-6, atol=1e-6)
    view[5, 7] = 123.0
    assert stored[7, 5] == 123.0


def test_unknown_layer_is_an_error_with_the_nearest_name():
    model = wrap_model(pico.llama(), name="pico")
    with pytest.raises(InputError, match="Did you mean 'lm_head'"):
        model.weight("lm_haed")


def test_patterns_that_may_match_nothing_exclude_where_they_match():
    module = pico.llama()
    with_head, _ = find_layers(module, exclude_if_there=["output", "model.embed_tokens"])
    assert with_head[-1].name == "lm_head"
    assert with_head[0].name != "model.embed_tokens"
    layers, skipped = find_layers(module, exclude_if_there=["lm_head"])
    assert "lm_head" not in {layer.name for layer in layers}
    assert "'lm_head'" in next(s.reason for s in skipped if s.name == "lm_head")
    with pytest.raises(InputError, match="'output' matches no module"):
        find_layers(module, exclude=["output"])
