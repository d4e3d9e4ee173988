"""The dual probe on convolutions against plain autograd, example by example, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hawqkit.errors import Unsupported
from hawqkit.formats import parse_format
from hawqkit.models.examples import make_examples
from hawqkit.models.model import wrap_model
from hawqkit.quantize.errors_of import make_errors
from hawqkit.sensitivity.dual_probe import DualProbe
from hawqkit.sensitivity.positions import PositionSampler
from hawqkit.sensitivity.probing import probe

FORMATS = ["int2-channel", "int4-channel-asym"]
CLASSES = 4

# name -> (layer, shape of one example without its channels)
LAYERS = {
    "plain": (lambda: nn.Conv2d(3, 4, 3), (6, 5)),
    "strided and padded": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (7, 6)),
    "dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=(1, 2), padding=2), (6, 7)),
    "same padding of an even kernel": (lambda: nn.Conv2d(3, 4, 4, padding="same"), (6, 6)),
    "pointwise": (lambda: nn.Conv2d(3, 4, 1), (4, 4)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (5, 5)),
    "one dimension, circular": (
        lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"),
        (8,),
    ),
    "three dimensions": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (4, 3)),
    "transposed, grouped, output padding": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, output_padding=1, groups=2),
        (3, 4),
    ),
    "transposed, one dimension, dilated": (lambda: nn.ConvTranspose1d(3, 2, 3, dilation=2), (5,)),
}


class Net(nn.Module):
    """A layer between a pointwise convolution and a head; the ReLU works in place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(layer.kernel_size)]
        self.stem = kind(2, layer.in_channels, 1)
        self.layer = layer
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(layer.out_channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.layer(self.relu(self.stem(x))))
        return self.head(x.flatten(2).mean(2))


def build(name: str) -> tuple[Net, Tensor]:
    make, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(7)
    net = Net(make()).double()
    for parameter in net.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values * 0.5
    return net, torch.randn(3, 2, *shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def all_pixels(monkeypatch):
    """Let the token score look at every pixel, which an oracle can do too."""
    monkeypatch.setattr("hawqkit.sensitivity.positions.PIXELS", 1)


def measured(net, x, *, positions=10_000):
    model = wrap_model(net, name="net")
    parsed = [parse_format(f) for f in FORMATS]
    weights = {layer.name: model.weight(layer.name) for layer in model.layers}
    errors = {
        n: make_errors(w, parsed, rounding="nearest", scale_dtype=torch.float32, keep="codes")
        for n, w in weights.items()
    }
    examples = make_examples(x, [0] * len(x), classes=CLASSES)
    probe = DualProbe(net, model.layers, weights, errors, formats=FORMATS, positions=positions)
    with probe as dual:
        found = dual.measure(examples.micro_batch(range(len(x))))
    made = {}
    for layer in model.layers:
        out = torch.empty(len(FORMATS), *weights[layer.name].shape, dtype=torch.float64)
        errors[layer.name].fill(weights[layer.name], out)
        made[layer.name] = torch.stack([model.from_rows(layer.name, e) for e in out])
    return model, made, found


def loss_of(net, x, label):
    return nn.functional.cross_entropy(net(x), label, reduction="sum")


@pytest.mark.parametrize("name", LAYERS)
def test_every_sum_of_a_convolution_equals_plain_autograd(name):
    net, x = build(name)
    model, errors, found = measured(net, x)
    labels = torch.from_numpy(found["labels"])
    for i, layer in enumerate(model.layers):
        parameter = model.parameter(layer.name).requires_grad_(True)
        rows = [
            torch.autograd.grad(loss_of(net, x[b : b + 1], labels[b]), parameter)[0]
            for b in range(len(x))
        ]
        parameter.requires_grad_(False)
        flat = torch.stack(rows).flatten(1)
        gram = flat @ flat.T
        np.testing.assert_allclose(found["squared_gradient"][:, i], gram.diagonal(), rtol=1e-9)
        off = gram[np.triu_indices(3, 1)]
        np.testing.assert_allclose(found["gram"][:, i], off, atol=1e-9 * float(gram.max()))
        wanted = flat @ errors[layer.name].flatten(1).T
        atol = 1e-9 * float(wanted.abs().max())
        np.testing.assert_allclose(found["directional"][:, i], wanted, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("name", LAYERS)
def test_the_token_sums_are_those_of_single_pixels(name, all_pixels):
    """A pixel's gradient: of the output there, or for a transposed layer of the input there."""
    net, x = build(name)
    model, errors, found = measured(net, x)
    index = [layer.name for layer in model.layers].index("layer")
    a, d = inside(net, x, torch.from_numpy(found["labels"]))
    weight = net.layer.weight.requires_grad_(True)
    transposed = isinstance(net.layer, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    norm, token, summed = np.zeros(3), np.zeros((3, 2)), np.zeros((3, 2))
    for b in range(3):
        grid = a[b] if transposed else d[b]
        for t in range(grid[0].numel()):
            mask = torch.zeros_like(grid).flatten(1)
            mask[:, t] = 1.0
            mask = mask.view_as(grid)
            source = a[b] * mask if transposed else a[b]
            reached = d[b] if transposed else d[b] * mask
            y = net.layer(source[None])[0]
            (g,) = torch.autograd.grad((y * reached).sum(), weight)  # (O, I/g, k) or (I, O/g, k)
            norm[b] += float(g.square().sum())
            terms = g * errors["layer"]  # (F, ...)
            token[b] += outputs_apart(terms, net.layer, transposed).square().sum(1).numpy()
            summed[b] += terms.flatten(1).sum(1).square().numpy()
    weight.requires_grad_(False)
    np.testing.assert_allclose(found["token_norm"][:, index], norm, rtol=1e-9)
    np.testing.assert_allclose(found["token"][:, index], token, rtol=1e-9)
    np.testing.assert_allclose(found["token_summed"][:, index], summed, rtol=1e-9)


def inside(net, x, labels):
    """Return what the layer was given, and the gradient at its output."""
    kept = {}

    def keep(_, given, made):
        kept["a"], kept["z"] = given[0].detach().clone(), made.detach().requires_grad_()
        return kept["z"].clone()

    handle = net.layer.register_forward_hook(keep)
    loss = loss_of(net, x, labels[:, 0])
    (d,) = torch.autograd.grad(loss, kept["z"])
    handle.remove()
    return kept["a"], d


def outputs_apart(terms, layer, transposed):
    """Return the products summed over the inputs of each output, (F, outputs)."""
    if not transposed:
        return terms.flatten(2).sum(2)
    g = layer.groups  # (I, O/g, k): every input of a group feeds the outputs of that group
    split = terms.reshape(len(terms), g, layer.in_channels // g, -1)
    return split.sum(2).flatten(1)


def test_weights_of_sampled_pixels_are_unbiased():
    """Any sum over pixels is met in the mean over seeds, within four standard errors."""
    values = torch.linspace(1.0, 3.0, 30).square()
    draws = []
    for seed in range(400):
        at = PositionSampler([5], None, 4, seed, torch.device("cpu")).at(30)  # two of thirty
        draws.append(float((values[at.index[0]] * at.weight[0]).sum()))
    error = np.std(draws, ddof=1) / 20
    assert abs(np.mean(draws) - float(values.sum())) < 4 * error
    assert error > 0


def test_an_unused_branch_has_zero_sensitivity_and_a_warning():
    net, x = build("plain")
    net.spare = nn.Conv2d(2, 2, 1).double()
    model = wrap_model(net, name="net")
    found = probe(model, make_examples(x, [0, 1, 2], classes=CLASSES), FORMATS)
    row = [layer.name for layer in found.layers].index("spare")
    assert found.trace[row] == 0.0
    for score in found.scores.values():
        if score.name != "weight-error":
            assert score.values[row] == (0.0, 0.0)
    assert any("do not depend on spare" in w for w in found.warnings)


def test_a_weight_that_is_read_without_its_module_is_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.head = nn.Linear(3, 3), nn.Linear(3, CLASSES)

        def forward(self, x):
            return self.head(x @ self.read.weight)

    model = wrap_model(Functional(), name="functional")
    examples = make_examples(torch.ones(2, 3), [0, 1], classes=CLASSES)
    with pytest.raises(Unsupported, match="although the logits depend"):
        probe(model, examples, FORMATS)


class Padding(nn.Conv2d):
    """Pads in its own forward, so that its output is larger than a convolution's would be."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Normalizing(nn.Conv2d):
    """Computes with another weight than the one it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class Passing(nn.Conv2d):
    """Has a forward of its own that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [Padding, Normalizing])
def test_a_layer_whose_forward_does_something_else_is_refused(kind):
    net = Net(kind(3, 4, 3))
    with torch.no_grad():  # inputs that are not zero, and a norm that is not one
        net.stem.weight.fill_(1.0)
        net.layer.weight.copy_(torch.linspace(-1, 1, 108).reshape(4, 3, 3, 3))
    model = wrap_model(net, name="net")
    with pytest.raises(Unsupported, match=f"layer layer is a {kind.__name__} whose forward"):
        probe(model, make_examples(torch.ones(2, 2, 6, 6), [0, 1], classes=CLASSES), FORMATS)


def test_a_forward_that_changes_nothing_is_measured_like_its_class():
    x, tables = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1)), []
    for kind in (nn.Conv2d, Passing):
        net = Net(kind(3, 4, 3))
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
        model = wrap_model(net, name="net")
        tables.append(probe(model, make_examples(x, [0, 1, 2, 3], classes=CLASSES), FORMATS))
    assert tables[0].trace == tables[1].trace
