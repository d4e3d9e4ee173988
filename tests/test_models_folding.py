from __future__ import annotations

import copy

import pico
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hawqkit.errors import InputError, NumericalError
from hawqkit.models.examples import make_examples
from hawqkit.models.folding import (
    batch_norms,
    fold_batch_norms,
    never_run,
    with_folded_batch_norms,
)
from hawqkit.models.model import wrap_model

# Two float64 evaluations of one affine map in different order: a few roundings of 1.1e-16 each.
EXACT = 1e-13
# Rounding the folded weights to float32 changes each by 6e-8 of itself, and a few layers add up.
ROUNDED = 2e-6


def images(channels: int = 3, size: int = 32, count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator)


def filled(net: nn.Module, seed: int = 0) -> nn.Module:
    pico.fill(net, seed)
    return pico.run_norms(net, seed).eval()


class Functional(nn.Module):
    """Convolutions and norms with functional activations, as ResNets on CIFAR are written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = functional.relu(self.bn2(self.conv2(x)) + x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (nn.Conv2d(4, 8, 3, groups=4, dilation=2), nn.BatchNorm2d(8, affine=False), (2, 4, 9, 9)),
        (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4, eps=0.1), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(2, 4, 2, groups=2), nn.BatchNorm3d(4), (2, 2, 4, 4, 4)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    ],
)
def test_one_layer_and_its_norm_become_one_layer_with_equal_outputs(layer, norm, shape):
    net = filled(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm))).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = net(x)
    folding = fold_batch_norms(net, x)
    assert folding.folded == {"1": "0"}
    assert folding.left == {}
    assert isinstance(net[1], nn.Identity)
    torch.testing.assert_close(net[0](x), wanted, rtol=EXACT, atol=EXACT)
    assert folding.difference < EXACT


def test_folded_weights_are_those_of_the_formula():
    net = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    conv, norm = copy.deepcopy(net[0]), copy.deepcopy(net[1])
    fold_batch_norms(net, images(size=8).double())
    for channel in range(4):
        scale = norm.weight[channel] / (norm.running_var[channel] + norm.eps).sqrt()
        bias = norm.bias[channel] + scale * (conv.bias[channel] - norm.running_mean[channel])
        torch.testing.assert_close(net[0].weight[channel], scale * conv.weight[channel])
        torch.testing.assert_close(net[0].bias[channel], bias)


@pytest.mark.parametrize(
    ("kind", "count"), [("resnet", 6), ("mobilenet", 52), ("efficientnet", 7), ("convnext", 0)]
)
def test_every_norm_of_transformers_image_models_is_folded(kind, count):
    model = pico.image_classifier(kind)
    x = images()
    wanted = model(pixel_values=x).logits
    folding = fold_batch_norms(model, {"pixel_values": x})
    assert (len(folding.folded), folding.left) == (count, {})
    assert not batch_norms(model)
    assert not any(module.training for module in model.modules())
    other = images(seed=9)  # not the images that were folded with
    fresh = pico.image_classifier(kind)
    for inputs, outputs in ((x, wanted), (other, fresh(pixel_values=other).logits)):
        change = (model(pixel_values=inputs).logits - outputs).abs().max().item()
        assert change <= ROUNDED * outputs.abs().max().item()
    assert folding.difference <= ROUNDED


def test_functional_activations_and_additions_do_not_hide_the_layer():
    net = filled(Functional())
    wanted = net(images())
    folding = fold_batch_norms(net, images())
    assert folding.folded == {"bn1": "conv1", "bn2": "conv2"}
    torch.testing.assert_close(net(images()), wanted, rtol=ROUNDED, atol=ROUNDED)


class Between(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(functional.relu(self.conv1(x))))
        return self.head(self.bn2(self.conv2(x)).mean((2, 3)))


class InPlace(Functional):
    def forward(self, x: Tensor) -> Tensor:
        between = self.conv1(x)
        between.relu_()
        return self.head(self.bn2(self.conv2(self.bn1(between))).mean((2, 3)))


class ReadTwice(Functional):
    def forward(self, x: Tensor) -> Tensor:
        between = self.conv1(x)
        x = self.bn1(between) + between
        return self.head(self.bn2(self.conv2(x)).mean((2, 3)))


class Returned(Functional):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        between = self.conv1(x)
        return self.head(self.bn2(self.conv2(self.bn1(between))).mean((2, 3))), between


class SharedLayer(Functional):
    def forward(self, x: Tensor) -> Tensor:
        one, other = self.bn1(self.conv1(x)), self.conv1(x.flip(3))
        return self.head(self.bn2(self.conv2(one + other)).mean((2, 3)))


class TwoLayers(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn1(self.conv2(self.bn1(self.conv1(x)))).mean((2, 3)))


class TiedWeight(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Conv2d(3, 4, 3, padding=1)
        self.twin.weight = self.conv1.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)) + self.twin(x)
        return self.head(self.bn2(self.conv2(x)).mean((2, 3)))


class Viewed(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x).transpose(2, 3))
        return self.head(self.bn2(self.conv2(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Between, "not the plain output"),
        (InPlace, "not the plain output"),
        (Viewed, "not the plain output"),
        (ReadTwice, "conv1 is read elsewhere"),
        (Returned, "conv1 is read elsewhere"),
        (SharedLayer, "conv1 is read elsewhere"),
        (TiedWeight, "conv1 is shared"),
        (TwoLayers, "several layers: conv1, conv2"),
    ],
)
def test_a_norm_that_may_not_be_folded_is_left_with_the_reason(kind, reason):
    net = filled(kind())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    wanted = net(images())
    folding = fold_batch_norms(net, images())
    assert reason in folding.left["bn1"]
    assert "bn1" not in folding.folded
    for name in ("bn1.weight", "bn1.running_mean", "conv1.weight"):
        assert torch.equal(net.state_dict()[name], before[name])
    for one, other in zip(*map(as_tuple, (net(images()), wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDED, atol=ROUNDED)


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


class Activated(nn.Conv2d):
    """A convolution whose own forward does more: only the outputs show it."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(super().forward(x))


class Asks(Functional):
    """Reads a number of the norm beside calling it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)) * self.bn1.num_features
        return self.head(self.bn2(self.conv2(x)).mean((2, 3)))


def test_what_only_the_outputs_show_is_undone_and_the_rest_is_folded():
    net = filled(
        nn.Sequential(
            Activated(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        )
    )
    weight = net[0].weight.clone()
    wanted = net(images(size=8))
    folding = fold_batch_norms(net, images(size=8))
    assert folding.folded == {"4": "3"}
    assert "changes the outputs" in folding.left["1"]
    assert torch.equal(net[0].weight, weight)
    assert isinstance(net[1], nn.BatchNorm2d)
    torch.testing.assert_close(net(images(size=8)), wanted, rtol=ROUNDED, atol=ROUNDED)

    net = filled(Asks())
    folding = fold_batch_norms(net, images())
    assert folding.folded == {"bn2": "conv2"}
    assert "the model fails: AttributeError" in folding.left["bn1"]
    net(images())


def test_norms_of_other_kinds_are_left():
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        Own(4),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        nn.BatchNorm2d(4),
    )
    pico.fill(net)
    for norm in (net[1], net[5]):
        norm.running_mean.fill_(0.5)
    folding = fold_batch_norms(net.eval(), images(size=8))
    assert folding.folded == {}
    assert "may do more" in folding.left["1"]
    assert "keeps no statistics" in folding.left["3"]
    assert "computed anew" in folding.left["5"]


def test_a_norm_over_positions_or_never_called_is_left():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.over, self.idle = (
                nn.Linear(4, 6),
                nn.BatchNorm1d(3),
                nn.BatchNorm1d(6),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.over(self.linear(x))

    net = filled(Net())
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    folding = fold_batch_norms(net, x)
    assert "norm's channels are not its own" in folding.left["over"]
    assert "never called" in folding.left["idle"]


def test_a_norm_that_was_never_run_is_refused_by_name():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert never_run(net) == ("1",)
    with pytest.raises(InputError, match=r"1: batch norm that was never run"):
        fold_batch_norms(net, images())
    # Checkpoints converted from elsewhere have statistics, and a count of 0.
    net[1].running_mean.fill_(0.1)
    assert int(net[1].num_batches_tracked) == 0
    assert fold_batch_norms(net, images()).folded == {"1": "0"}


def test_training_mode_is_refused():
    net = filled(Functional()).train()
    with pytest.raises(InputError, match=r"bn1, bn2: in training mode.*call \.eval\(\)"):
        fold_batch_norms(net, images())


def test_outputs_that_are_not_finite_are_refused():
    net = filled(Functional())
    with pytest.raises(NumericalError, match="NaN or infinity"):
        fold_batch_norms(net, torch.full((1, 3, 8, 8), float("inf")))


def test_a_bfloat16_model_is_folded_and_the_cost_of_rounding_is_said():
    net = filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(torch.bfloat16)
    folding = fold_batch_norms(net, images().to(torch.bfloat16))
    assert folding.folded == {"1": "0"}
    assert net[0].bias.dtype == torch.bfloat16
    assert 1e-4 < folding.difference < 0.05  # a rounding to 8 bits is 2^-9


def test_a_loaded_model_is_counted_again():
    model = wrap_model(pico.image_classifier("resnet"), name="resnet")
    data = make_examples({"pixel_values": images(count=4)}, [0, 1, 2, 3], classes=5)
    norms = sum(2 * n.num_features for n in batch_norms(model.module).values())
    folded, folding = with_folded_batch_norms(model, data)
    assert len(folding.folded) == 6
    assert folded.layers == model.layers
    # A norm's weight and bias go, and its layer gains a bias.
    assert folded.facts.parameters == model.facts.parameters - norms // 2
    assert folded.facts.hash != model.facts.hash
    stored = sum(p.numel() for p in folded.module.parameters())
    assert sum(t.nbytes for t in folded.facts.tensors) == 4 * stored
    (vectors,) = [s for s in folded.skipped if s.kind == "vector"]
    assert vectors.shape == (sum(p.numel() for p in folded.module.parameters() if p.ndim < 2),)
    again, nothing = with_folded_batch_norms(folded, data)
    assert (nothing.folded, nothing.left) == ({}, {})
    assert again.facts.hash == folded.facts.hash
    assert not any(p.requires_grad for p in folded.module.parameters())
