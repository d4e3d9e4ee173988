"""The classifiers that are measured, trained here on one thread and kept in the cache.

    python benchmarks/classifiers/subjects.py resnet20 0     # train one, if need be, and test it

`resnet20`, `resnet8`, `efficientnet_lite0` and `minilm` each return a network in evaluation mode
with examples to calibrate on and examples that are held out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import Arrays, cache, fashion, fetched, large_images, sentences, small_images, tokenized
from networks import EfficientNetLite0, ResNet, renamed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

HEAD_IMAGES = 3000  # training images that EfficientNet's head is fitted to
LARGE_CALIBRATION = 3072  # training images behind those, to calibrate on
LARGE_HELD_OUT = 2000
TRAINED_SENTENCES = 2000
RESNET_EPOCHS, MINILM_EPOCHS = 6, 2


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A classifier with its data.

    Attributes:
        name: with the seed.
        module: in evaluation mode.
        calibration: examples to calibrate on; no less typical of its answers than those held out.
        held_out: examples that training never saw.
        facts: what training wrote down: held-out accuracy, seconds, epochs.
    """

    name: str
    module: nn.Module
    calibration: Arrays
    held_out: Arrays
    facts: dict[str, float]

    def __iter__(self) -> Iterator[Any]:
        """Unpack as module, calibration, held_out."""
        return iter((self.module, self.calibration, self.held_out))


def resnet20(seed: int = 0) -> Subject:
    """ResNet-20 on Fashion-MNIST, 28 x 28: 272,186 parameters, 60,000 images."""
    return _resnet(f"resnet20-{seed}", 3, seed)


def resnet8(seed: int = 0) -> Subject:
    """ResNet-8 on Fashion-MNIST, 28 x 28."""
    return _resnet(f"resnet8-{seed}", 1, seed)


def efficientnet_lite0() -> Subject:
    """EfficientNet-Lite0 with its ImageNet weights, a linear head for Fashion-MNIST at 96 x 96.

    The head is fitted to 3,000 training images; the network is calibrated on others, since on
    those its predictions are surer than elsewhere.
    """
    pixels, labels = fashion("train")
    fitted, free = slice(0, HEAD_IMAGES), slice(HEAD_IMAGES, HEAD_IMAGES + LARGE_CALIBRATION)
    test_pixels, test_labels = (t[:LARGE_HELD_OUT] for t in fashion("t10k"))
    held_out = Arrays({"x": large_images(test_pixels)}, test_labels)

    def train(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, EfficientNetLite0)
        _fit_head(module, large_images(pixels[fitted]), labels[fitted])
        return {"epochs": 0}

    def make() -> nn.Module:
        path = fetched("efficientnet/efficientnet-lite0-57934424.pth")
        state = renamed(torch.load(path, map_location="cpu", weights_only=True))
        for name in ("fc.weight", "fc.bias"):  # of ImageNet's classes
            del state[name]
        module = EfficientNetLite0()
        missing, unknown = module.load_state_dict(state, strict=False)
        if unknown or set(missing) != {"fc.weight", "fc.bias"}:
            raise SystemExit(f"{path} is another network: lacks {missing}, has {unknown}.")
        return module

    calibration = Arrays({"x": large_images(pixels[free])}, labels[free])
    module, facts = _trained("efficientnet-lite0", 0, make, train, held_out)
    return Subject("efficientnet-lite0", module, calibration, held_out, facts)


def minilm(seed: int = 0) -> Subject:
    """MiniLM (BERT, 6 layers, 22.7 M parameters) fine-tuned on 2,000 sentences.

    Of the other 1,000, one half is there to calibrate on, the other is held out; the seed draws
    which. On the sentences that it was tuned on the network is so sure of itself that a KL is
    predicted ten times too low, and layers are ranked worse.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = fetched("minilm")
    texts, labels = sentences()
    inputs = tokenized(AutoTokenizer.from_pretrained(folder), texts)
    everything = Arrays(inputs, labels)
    training = everything.take(slice(0, TRAINED_SENTENCES))
    unseen = everything.take(slice(TRAINED_SENTENCES, len(labels)))

    def make() -> nn.Module:
        # With the kernels of scaled_dot_product_attention the true Hessian has no derivative here.
        network: nn.Module = BertForSequenceClassification(
            BertConfig.from_pretrained(folder, num_labels=2, attn_implementation="eager")
        )
        return network

    def train(module: nn.Module) -> dict[str, float]:
        state = load_file(folder / "model.safetensors")
        own = {f"bert.{name}": value for name, value in state.items()}
        missing, _ = module.load_state_dict(own, strict=False)
        if missing_of_body := [n for n in missing if not n.startswith("classifier.")]:
            raise SystemExit(f"{folder} lacks weights of BERT: {', '.join(missing_of_body)}.")
        _fine_tune(module, training)
        return {"epochs": MINILM_EPOCHS}

    module, facts = _trained(f"minilm-{seed}", seed, make, train, unseen)
    order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(seed))
    calibration, held_out = (unseen.take(half) for half in order.chunk(2))
    return Subject(f"minilm-{seed}", module, calibration, held_out, facts)


SUBJECTS: dict[str, Callable[..., Subject]] = {
    "resnet20": resnet20,
    "resnet8": resnet8,
    "efficientnet_lite0": efficientnet_lite0,
    "minilm": minilm,
}


def _resnet(name: str, blocks: int, seed: int) -> Subject:
    pixels, labels = fashion("train")
    test_pixels, test_labels = fashion("t10k")
    training = Arrays({"x": small_images(pixels)}, labels)
    held_out = Arrays({"x": small_images(test_pixels)}, test_labels)

    def train(module: nn.Module) -> dict[str, float]:
        _train_images(module, training)
        return {"epochs": RESNET_EPOCHS}

    module, facts = _trained(name, seed, lambda: ResNet(blocks), train, held_out)
    return Subject(name, module, training, held_out, facts)


def _trained(
    name: str,
    seed: int,
    make: Callable[[], nn.Module],
    train: Callable[[nn.Module], dict[str, float]],
    held_out: Arrays,
) -> tuple[nn.Module, dict[str, float]]:
    """Return a network from the cache, or train it and keep it there."""
    path = cache() / "trained" / f"{name}.safetensors"
    if path.exists():
        module = make()
        module.load_state_dict(load_file(path))
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        return module.eval(), facts
    with drawing_from(seed):
        module = make()
        start = time.perf_counter()
        facts = train(module)
        seconds = time.perf_counter() - start
    accuracy, loss = accuracy_and_loss(module.eval(), held_out)
    facts |= {"accuracy": accuracy, "loss": loss, "seconds": round(seconds, 1), "seed": seed}
    _keep(module, facts, path)
    return module, facts


def _keep(module: nn.Module, facts: dict[str, float], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().contiguous() for name, value in module.state_dict().items()}
    unfinished = path.with_suffix(".unfinished")
    save_file(state, unfinished, metadata={"facts": json.dumps(facts)})
    unfinished.replace(path)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let first weights and dropout, which take no generator, draw from a seed; then undo that."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        yield


@torch.no_grad()
def accuracy_and_loss(module: nn.Module, examples: Arrays, batch: int = 100) -> tuple[float, float]:
    """Return the share of right answers and the mean cross-entropy."""
    right, loss = 0, 0.0
    for start in range(0, len(examples), batch):
        part = examples.take(slice(start, start + batch))
        z = _logits(module, part)
        right += int((z.argmax(1) == part.labels).sum())
        loss += float(cross_entropy(z, part.labels, reduction="sum"))
    return right / len(examples), loss / len(examples)


def _logits(module: nn.Module, examples: Arrays) -> Tensor:
    if "x" in examples.inputs:
        made: Tensor = module(examples.inputs["x"])
        return made
    length = int(examples.inputs["attention_mask"].sum(1).max())  # of the longest sentence
    answer = module(**{name: value[:, :length] for name, value in examples.inputs.items()})
    logits: Tensor = answer.logits
    return logits


def _train_images(module: nn.Module, examples: Arrays, batch: int = 128) -> None:
    """One-cycle SGD with mirrored images; channels innermost, which takes 0.6 of the time."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = len(examples) // batch
    optimizer = torch.optim.SGD(
        module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.4, total_steps=RESNET_EPOCHS * steps, pct_start=0.25
    )
    module.train()
    for _ in range(RESNET_EPOCHS):
        for index in torch.split(torch.randperm(len(examples))[: steps * batch], batch):
            x = examples.inputs["x"][index]
            x = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x.flip(3), x)
            x = x.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            cross_entropy(module(x), examples.labels[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _fit_head(module: EfficientNetLite0, images: Tensor, labels: Tensor) -> None:
    """Fit the head to standardized features, then fold the standardization into it.

    With f the features, W (f - mean) / std + b = (W / std) f + (b - W mean / std).
    """
    module.eval()
    with torch.no_grad():
        features = torch.cat([module.features(x) for x in torch.split(images, 100)])
    mean, std = features.mean(0), features.std(0)
    std = std.clamp_min(0.2 * float(std.mean()))  # some features are hardly ever there
    standard = (features - mean) / std
    head = nn.Linear(standard.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=150)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(standard), labels) + 3e-2 * head.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        module.fc.weight.copy_(head.weight / std)
        module.fc.bias.copy_(head.bias - head.weight @ (mean / std))


def _fine_tune(module: nn.Module, examples: Arrays, batch: int = 32) -> None:
    """One-cycle AdamW; sentences of about one length go together."""
    steps = len(examples) // batch
    head = [p for n, p in module.named_parameters() if n.startswith("classifier.")]
    body = [p for n, p in module.named_parameters() if not n.startswith("classifier.")]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": 1e-4}, {"params": head, "lr": 1e-3}], weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [1e-4, 1e-3], total_steps=MINILM_EPOCHS * steps, pct_start=0.1
    )
    lengths = examples.inputs["attention_mask"].sum(1)
    module.train()
    for _ in range(MINILM_EPOCHS):
        drawn = torch.randperm(len(examples))[: steps * batch]
        order = drawn[(lengths[drawn] // 8 + torch.rand(len(drawn))).argsort()]
        batches = torch.split(order, batch)
        for number in torch.randperm(len(batches)).tolist():
            part = examples.take(batches[number])
            optimizer.zero_grad()
            cross_entropy(_logits(module, part), part.labels).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=sorted(SUBJECTS))
    parser.add_argument("seed", type=int, nargs="?", default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    make = SUBJECTS[args.subject]
    subject = make() if make is efficientnet_lite0 else make(args.seed)
    accuracy, loss = accuracy_and_loss(subject.module, subject.held_out)
    count = sum(p.numel() for p in subject.module.parameters())
    print(f"{subject.name}: {count:,} parameters, {len(subject.calibration)} examples to calibrate")
    print(f"held out ({len(subject.held_out)}): {accuracy:.4f} right, loss {loss:.4f}")
    print(f"training wrote down, of all unseen: {subject.facts}")


if __name__ == "__main__":
    main()
