from __future__ import annotations

import math

import pico
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from hawqkit.errors import Unsupported
from hawqkit.models.examples import make_examples
from hawqkit.models.model import wrap_model
from hawqkit.models.operations import Operations, count_operations, with_operations


def counted(net: nn.Module, shape: tuple[int, ...], count: int = 2) -> dict[str, Operations]:
    x = torch.randn((count, *shape), generator=torch.Generator().manual_seed(0))
    data = make_examples(x, [0] * count, classes=5)
    return count_operations(wrap_model(net, name="net"), data.micro_batch(range(count)))


class Pooled(nn.Module):
    """One layer, its output averaged down to logits."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(2).mean(2)


def outputs(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@pytest.mark.parametrize(
    ("inputs", "channels", "kernel", "groups", "stride", "padding", "dilation"),
    [
        (3, 8, 3, 1, 1, 1, 1),
        (4, 8, 3, 4, 2, 1, 1),
        (6, 6, 5, 6, 1, 2, 1),  # depthwise
        (4, 6, 3, 2, 3, 2, 2),
        (4, 6, 1, 1, 2, 0, 1),
    ],
)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions_cost_what_the_closed_form_says(
    dimensions, inputs, channels, kernel, groups, stride, padding, dilation
):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    layer = kind(inputs, channels, kernel, stride, padding, dilation, groups)
    found = counted(Pooled(layer), (inputs, *[9] * dimensions))["layer"]
    places = outputs(9, kernel, stride, padding, dilation) ** dimensions
    assert found.macs == places * channels * (inputs // groups) * kernel**dimensions
    assert found.input_shape == (2, inputs, *[9] * dimensions)
    assert found.output_shape[:2] == (2, channels)
    assert math.prod(found.output_shape[2:]) == places
    assert found.calls == 1


@pytest.mark.parametrize(("groups", "stride", "padding"), [(1, 1, 0), (2, 2, 1), (4, 3, 0)])
def test_transposed_convolutions_cost_a_kernel_for_each_input(groups, stride, padding):
    layer = nn.ConvTranspose2d(4, 8, 3, stride, padding, groups=groups)
    found = counted(Pooled(layer), (4, 7, 6))["layer"]
    assert found.macs == 7 * 6 * 4 * (8 // groups) * 9


def test_linear_and_transposed_conv1d_cost_a_row_for_each_position():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), Conv1D(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)).mean(1)

    found = counted(Net(), (7, 6))
    assert found["one"] == Operations(7 * 6 * 8, (2, 7, 6), (2, 7, 8), 1)
    assert found["two"].macs == 7 * 8 * 5


@pytest.mark.parametrize("kind", ["resnet", "mobilenet", "convnext", "efficientnet"])
def test_image_models_agree_with_torchs_own_counter(kind):
    model = pico.image_classifier(kind)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=x)
    wrapped = wrap_model(model, name=kind)
    data = make_examples({"pixel_values": x}, [0, 1, 2], classes=5)
    found = count_operations(wrapped, data.micro_batch(range(3)))
    assert list(found) == [layer.name for layer in wrapped.layers]
    # The counter sees two operations in a multiply-accumulate; these nets multiply nothing else.
    assert 3 * sum(f.macs for f in found.values()) == counter.get_total_flops() // 2
    carried = with_operations(wrapped, data)
    assert {x.name: x.macs for x in carried.layers} == {n: f.macs for n, f in found.items()}
    assert all(layer.macs == 0 for layer in wrapped.layers)


def test_text_models_agree_but_for_the_products_of_attention():
    model = pico.text_classifier()
    tokens = torch.randint(8, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    wrapped = wrap_model(model, name="bert")
    data = make_examples({"input_ids": tokens, "attention_mask": torch.ones(2, 12).long()}, [0, 1])
    found = count_operations(wrapped, data.micro_batch([0, 1]))
    attention = 2 * 12 * 12 * 16  # scores and their weighted values, over all heads
    total = sum(f.macs for f in found.values()) + attention
    assert 2 * total == counter.get_total_flops() // 2
    assert found["bert.embeddings.word_embeddings"].macs == 0
    assert found["bert.embeddings.word_embeddings"].calls == 1


def test_a_layer_called_twice_and_a_tied_one_are_summed():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.shared = nn.Embedding(7, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.idle = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.shared(self.shared(self.embed(x)))).mean(1)

    model = wrap_model(Net(), name="net")
    data = make_examples(torch.zeros(3, 5, dtype=torch.int64), [0, 1, 2], classes=7)
    found = count_operations(model, data.micro_batch([0, 1]))
    assert found["shared"] == Operations(2 * 5 * 16, (2, 5, 4), (2, 5, 4), 2)
    assert (found["embed"].macs, found["embed"].calls) == (5 * 28, 2)
    assert found["idle"] == Operations(0, None, None, 0)


def test_texts_of_unequal_length_have_no_fixed_number_and_the_message_says_so():
    model = wrap_model(pico.text_classifier(), name="bert")
    tokens = torch.full((3, 9), 8)
    lengths = torch.tensor([9, 4, 6])
    mask = (torch.arange(9)[None] < lengths[:, None]).long()
    data = make_examples({"input_ids": tokens, "attention_mask": mask}, [0, 1, 2], classes=3)
    with pytest.raises(Unsupported, match=r"vary from example to example") as caught:
        with_operations(model, data)
    message = str(caught.value)
    assert "(1, 4, 16) in example 1" in message
    assert "(1, 9, 16) in example 0" in message
    assert "bit operations needs examples of one size" in message
    whole = make_examples({"input_ids": tokens, "attention_mask": mask * 0 + 1}, [0, 1, 2])
    query = "bert.encoder.layer.0.attention.self.query"
    macs = {x.name: x.macs for x in with_operations(model, whole).layers}
    assert macs[query] == 9 * 16 * 16


def test_packed_text_of_a_language_model_is_counted_and_unequal_text_is_refused():
    model = wrap_model(pico.llama(), name="llama")
    macs = {x.name: x.macs for x in with_operations(model, pico.sequences(4, 24)).layers}
    assert macs["model.layers.0.mlp.up_proj"] == 24 * 64 * 128
    with pytest.raises(Unsupported, match="vary"):
        with_operations(model, pico.sequences(4, 24, ragged=True))


def test_routing_that_depends_on_the_example_is_refused():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.extra = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.head(x)
            chosen = x[:, 0] > 0
            out[chosen] = out[chosen] + self.extra(x[chosen])
            return out

    model = wrap_model(Routed(), name="net")
    x = torch.ones(3, 3)
    x[2] = -1
    data = make_examples(x, [0, 1, 2], classes=3)
    with pytest.raises(Unsupported, match=r"extra.*no whole number"):
        count_operations(model, data.micro_batch([0, 2]))
    with pytest.raises(Unsupported, match="vary from example to example: extra"):
        with_operations(model, data)
