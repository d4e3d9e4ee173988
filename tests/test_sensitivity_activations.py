"""Rounded inputs in the dual probe, against plain autograd of the perturbed output in float64."""

from __future__ import annotations

import numpy as np
import pico
import pytest
import torch
from torch import Tensor, nn

from hawqkit.errors import InputError, StateMismatch
from hawqkit.formats import parse_format
from hawqkit.models.examples import make_examples
from hawqkit.models.model import wrap_model
from hawqkit.quantize.activations import ActivationSettings, calibrate_activations
from hawqkit.quantize.errors_of import make_errors
from hawqkit.sensitivity.columns import weight_formats
from hawqkit.sensitivity.dual_probe import DualProbe
from hawqkit.sensitivity.probing import ProbeSettings, probe
from hawqkit.sensitivity.scores import SCORES, sums_of
from hawqkit.sensitivity.summary import facts_of

FORMATS = ["w2a4", "int2-channel", "int4-channel-asym-a4", "none", "w2a2", "w4a8-asym"]
WIDTHS = {"w2a4": 4, "int4-channel-asym-a4": 4, "w2a2": 2, "w4a8-asym": 8}
CLASSES = 4


class Net(nn.Module):
    """Convolutions of every kind, a branch that reads the same tensor, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, stride=2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.one = nn.Linear(3, 5)
        self.two = nn.Linear(3, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.up(self.relu(self.grouped(self.relu(self.stem(x))))))
        x = x.flatten(2).transpose(1, 2)  # (B, pixels, 3)
        y = self.one(x) * torch.tanh(self.two(x))
        return self.head(y.mean(1))


def filled(net: nn.Module, seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values * 0.6
    return net.double()


def images(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)


class Case:
    """A network probed with given formats, and what an oracle needs to say the same."""

    def __init__(self, net, data, *, mode="static", positions=10_000, seed=0, **options):
        self.net, self.data = net, data
        self.model = wrap_model(net, name="net")
        layers = self.model.layers
        self.ranges = calibrate_activations(self.model, data, layers, [8, 4, 2], mode=mode)
        self.weights = {x.name: self.model.weight(x.name) for x in layers}
        self.errors = {
            n: make_errors(
                w,
                weight_formats(FORMATS),
                rounding="nearest",
                scale_dtype=torch.float32,
                keep="codes",
            )
            for n, w in self.weights.items()
        }
        probe = DualProbe(
            net,
            layers,
            self.weights,
            self.errors,
            formats=FORMATS,
            activations=self.ranges,
            positions=positions,
            seed=seed,
            **options,
        )
        with probe as dual:
            self.found = dual.measure(data.micro_batch(range(len(data))))

    def weight_error(self, name: str, format_name: str) -> Tensor:
        """dW in the parameter's own shape; zero for formats of no weight."""
        made = self.errors[name]
        out = torch.empty(len(made.formats), *self.weights[name].shape, dtype=torch.float64)
        made.fill(self.weights[name], out)
        place = [f.name for f in made.formats].index(parse_format(format_name).weights.name)
        return self.model.from_rows(name, out[place])

    def rounded(self, name: str, values: Tensor, format_name: str) -> Tensor:
        """The input as a format rounds it, by the formula of the grid or of the token."""
        if format_name not in WIDTHS:
            return values
        bits = WIDTHS[format_name]
        grid = self.ranges.grid(name, bits)
        if grid is not None:
            steps = 2**bits - 1
            codes = torch.clamp(torch.round(values / grid.scale) + grid.zero, 0, steps)
            return (codes - grid.zero) * grid.scale
        module = self.net.get_submodule(name)
        dim = -1 if isinstance(module, nn.Linear) else 1
        low = values.amin(dim, keepdim=True).clamp(max=0)
        high = values.amax(dim, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).float().double()
        scale[scale == 0] = 1.0
        zero = torch.round(-low / scale)
        return (torch.clamp(torch.round(values / scale) + zero, 0, 2**bits - 1) - zero) * scale


def traced(net: nn.Module, name: str, run, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer's input, output, and the gradient of the loss of one example there."""
    kept = {}

    def keep(_, given, made):
        kept["a"], kept["y"] = given[0].detach().clone(), made.detach().clone().requires_grad_()
        return kept["y"].clone()

    handle = net.get_submodule(name).register_forward_hook(keep)
    loss = nn.functional.cross_entropy(run(), label, reduction="sum", ignore_index=-1)
    (d,) = torch.autograd.grad(loss, kept["y"])
    handle.remove()
    return kept["a"], kept["y"].detach(), d


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_directional_sample_is_the_loss_along_the_whole_error_of_the_output(mode):
    """g . dW~ + g_a . da equals d . (layer(W + dW, a + da) - layer(W, a)): exact, product too."""
    net, x = filled(Net()), images()
    case = Case(net, make_examples(x, [0, 1, 2], classes=CLASSES), mode=mode)
    labels = torch.from_numpy(case.found["labels"])
    for i, layer in enumerate(case.model.layers):
        module = net.get_submodule(layer.name)
        for b in range(len(x)):
            a, y, d = traced(net, layer.name, lambda b=b: net(x[b : b + 1]), labels[b])
            for column, name in enumerate(FORMATS):
                if name == "none":
                    assert case.found["directional"][b, i, column] == 0.0
                    continue
                kept = module.weight.data
                module.weight.data = kept + case.weight_error(layer.name, name)
                changed = module(case.rounded(layer.name, a, name)).detach()
                module.weight.data = kept
                wanted = float((d * (changed - y)).sum())
                size = float(d.norm() * (changed - y).norm())
                got = case.found["directional"][b, i, column]
                assert abs(got - wanted) <= 1e-9 * size, (layer.name, name)


def test_the_sums_over_inputs_are_those_of_autograd_through_this_layer_alone():
    """`one` and `two` read the same tensor: each gets the gradient through itself."""
    net, x = filled(Net()), images()
    case = Case(net, make_examples(x, [0, 1, 2], classes=CLASSES))
    labels = torch.from_numpy(case.found["labels"])
    for i, layer in enumerate(case.model.layers):
        module = net.get_submodule(layer.name)
        for b in range(len(x)):
            a, _, d = traced(net, layer.name, lambda b=b: net(x[b : b + 1]), labels[b])
            source = a.clone().requires_grad_()
            (g,) = torch.autograd.grad((module(source) * d).sum(), source)
            size = float(g.square().sum())
            np.testing.assert_allclose(case.found["input_squares"][b, i], size, rtol=1e-9)
            assert case.found["input_count"][b, i] == a.numel()
            for column, name in enumerate(FORMATS):
                da = case.rounded(layer.name, a, name) - a if name in WIDTHS else 0 * a
                np.testing.assert_allclose(
                    case.found["input_error"][b, i, column], float(da.square().sum()), rtol=1e-9
                )
                np.testing.assert_allclose(
                    case.found["input_linear"][b, i, column],
                    float((g * da).sum()),
                    rtol=1e-9,
                    atol=1e-9 * float(g.norm() * da.norm()),
                )


def test_token_sums_take_the_rounded_inputs(monkeypatch):
    net, x = filled(Net()), images()
    monkeypatch.setattr("hawqkit.sensitivity.positions.PIXELS", 1)
    case = Case(net, make_examples(x, [0, 1, 2], classes=CLASSES))
    labels = torch.from_numpy(case.found["labels"])
    i = [layer.name for layer in case.model.layers].index("two")
    for b in range(len(x)):
        a, _, d = traced(net, "two", lambda b=b: net(x[b : b + 1]), labels[b])
        norm = float((d.square().sum(-1) * a.square().sum(-1)).sum())
        np.testing.assert_allclose(case.found["token_norm"][b, i], norm, rtol=1e-9)
        for column, name in enumerate(FORMATS):
            if name == "none":
                continue
            y = case.rounded("two", a, name) @ case.weight_error("two", name).T
            token, summed = (d * y).square().sum(), (d * y).sum(-1).square().sum()
            np.testing.assert_allclose(case.found["token"][b, i, column], float(token), rtol=1e-9)
            got = case.found["token_summed"][b, i, column]
            np.testing.assert_allclose(got, float(summed), rtol=1e-9)


def test_the_expected_square_is_the_dense_form_of_the_joint_error():
    """E (g . dW~ + g_a . da)^2 = u' G u, u = dW (a + da) + W da, within four standard errors."""
    net, x, draws = filled(Net()), images(2), 400
    data = make_examples(x.repeat(draws, 1, 1, 1), [0, 1] * draws, classes=CLASSES)
    case = Case(net, data, positions=0)  # every copy draws labels of its own
    i = [layer.name for layer in case.model.layers].index("one")
    for column in (FORMATS.index("w2a4"), FORMATS.index("w2a2")):
        wanted = 0.0
        for b in range(2):
            label = torch.zeros(1, dtype=torch.int64)
            a, y, _ = traced(net, "one", lambda b=b: net(x[b : b + 1]), label)
            u = (
                case.rounded("one", a, FORMATS[column])
                @ case.weight_error("one", FORMATS[column]).T
            )
            u = u + (case.rounded("one", a, FORMATS[column]) - a) @ net.one.weight.T

            def logits(out, b=b):
                handle = net.one.register_forward_hook(lambda *_: out)
                try:
                    return net(x[b : b + 1])[0]
                finally:
                    handle.remove()

            _, along = torch.func.jvp(logits, (y,), (u,))
            p = logits(y).softmax(-1)
            wanted += float((p * along.square()).sum() - (p * along).sum() ** 2)
        found = (case.found["directional"][:, i, column] ** 2).reshape(draws, 2).sum(1)
        stderr = found.std(ddof=1) / draws**0.5
        assert abs(found.mean() - wanted) < 4 * stderr
        assert stderr < 0.1 * wanted


def text_case(tied=True, size=None, **options):
    net = pico.gpt2(dtype=torch.float64, tied=tied, hidden=32)
    model = wrap_model(net, name="pico")
    batches = pico.sequences(3, 12, ragged=True, withheld=1)
    formats = ["int3-g32-a4", "int8-channel-a8", "int3-g32"]
    ranges = calibrate_activations(model, batches, model.layers, [8, 4])
    found = probe(
        model,
        batches,
        formats,
        settings=ProbeSettings(batch=size or 3, positions=100, **options),
        activations=ranges,
    )
    return model, batches, ranges, found


def test_padding_batches_and_checkpointing_change_no_sum():
    whole = text_case(size=3)[3].samples
    for options in ({"size": 1}, {"size": 2, "checkpointing": True}):
        other = text_case(**options)[3].samples
        for name in (
            "directional",
            "token",
            "input_squares",
            "input_count",
            "input_error",
            "input_linear",
        ):
            a, b = getattr(other, name), getattr(whole, name)
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * float(np.abs(b).max()))


def test_a_lookup_has_no_input_and_its_use_as_head_has_one():
    _, batches, _, found = text_case(tied=True)
    names = [layer.name for layer in found.layers]
    row = names.index("transformer.wte")
    counted = found.samples.input_count[:, row]
    np.testing.assert_array_equal(counted, batches.attention.sum(1).numpy() * 32)
    assert (found.samples.input_error[:, row, :2] > 0).all()
    _, _, ranges, found = text_case(tied=False)
    assert "transformer.wte" not in ranges.layers
    row = [layer.name for layer in found.layers].index("transformer.wte")
    samples = found.samples
    assert (samples.input_count[:, row] == 0).all()
    np.testing.assert_array_equal(
        samples.directional[:, row, 0], samples.directional[:, row, 2]
    )  # int3-g32-a4 does to it what int3-g32 does


def test_scores_are_their_formulas():
    _, _, _, found = text_case()
    s, facts = found.samples, facts_of(found)
    chosen = s.withheld == 0
    n = s.count[chosen].sum()

    def total(values):
        return values[chosen].sum(0)

    weights = {
        "trace": 0.5 * total(s.squared_gradient)[:, None] / n / facts.numel[:, None]
        * facts.weight_error,
        "token": 0.5 * (total(s.squared_gradient) / n / total(s.token_norm))[:, None]
        * total(s.token),
        "token-summed": 0.5 * (total(s.squared_gradient) / n / total(s.token_norm))[:, None]
        * total(s.token_summed),
        "weight-error": 0.5 * total(s.squared_gradient).sum() / n / facts.numel.sum()
        * facts.weight_error,
        "directional": 0 * facts.weight_error,
    }  # fmt: skip
    curvature = s.input_squares / s.input_count
    mean = total(s.input_squares).sum() / total(s.input_count).sum()
    inputs = {
        "trace": 0.5 * total(curvature[..., None] * s.input_error) / n,
        "token": 0.5 * total(s.input_linear**2) / n,
        "token-summed": 0.5 * total(s.input_linear**2) / n,
        "weight-error": 0.5 * mean * total(s.input_error) / n,
        "directional": 0.5 * total(s.directional**2) / n,
    }
    for name, part in weights.items():
        values = np.array(found.scores[name].values, dtype=float)
        np.testing.assert_allclose(values, part + inputs[name], rtol=1e-9)
        assert (inputs[name][:, 0] > 0).all()
    for name in SCORES:
        stderr = np.array(found.scores[name].stderr, dtype=float)
        assert np.isfinite(stderr).all()
    assert set(sums_of(s)) >= {"input_isotropic", "input_squared"}


def test_equal_weights_cost_no_second_rounding_and_give_equal_errors():
    net, data = filled(Net()), make_examples(images(), [0, 1, 2], classes=CLASSES)
    model = wrap_model(net, name="net")
    found = probe(model, data, ["w3a8", "w3a4", "int3-channel"], settings=ProbeSettings(batch=3))
    error = np.array(found.weight_error, dtype=float)
    np.testing.assert_array_equal(error[:, 0], error[:, 2])
    np.testing.assert_array_equal(error[:, 1], error[:, 2])
    plain = probe(model, data, ["int3-channel"], settings=ProbeSettings(batch=3))
    assert plain.samples.input_error is None
    assert plain.activations is None
    for name in ("directional", "token", "token_norm", "squared_gradient"):
        of_all, alone = getattr(found.samples, name), getattr(plain.samples, name)
        if of_all.ndim == 3:
            of_all, alone = of_all[..., 2], alone[..., 0]
        np.testing.assert_allclose(of_all, alone, rtol=1e-9, atol=1e-14)


def test_the_probe_calibrates_by_itself_and_its_fingerprint_knows_the_ranges(tmp_path):
    net, data = filled(Net()), make_examples(images(), [0, 1, 2], classes=CLASSES)
    model = wrap_model(net, name="net")
    settings = ProbeSettings(batch=3)
    first = probe(model, data, ["w4a4"], settings=settings, folder=tmp_path)
    assert first.activations is not None
    assert first.activations_fingerprint == first.activations.fingerprint
    again = probe(
        model, data, ["w4a4"], settings=settings, activations=first.activations, folder=tmp_path
    )
    assert again.fingerprint == first.fingerprint
    other = ActivationSettings(observer="percentile", percentile=90.0)
    with pytest.raises(StateMismatch, match="activations"):
        probe(model, data, ["w4a4"], settings=settings, activations=other, folder=tmp_path)
    with pytest.raises(InputError, match="none of the formats int4-channel rounds the inputs"):
        probe(model, data, ["int4-channel"], activations=other)
    with pytest.raises(InputError, match="w4a8 and int4-channel-a8 are one format"):
        probe(model, data, ["w4a8", "int4-channel-a8"])
    narrow = calibrate_activations(model, data, model.layers, [8])
    with pytest.raises(InputError, match="wanted in 4 bits, and ranges were made for 8"):
        probe(model, data, ["w4a4"], activations=narrow)
