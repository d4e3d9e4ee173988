"""Mixes of GGUF types: hawqkit's beside llama.cpp's own of the same size, both run by llama.cpp.

    bash .ci/consumer llama.cpp
    python benchmarks/gguf_mixes.py [--seeds N] [--mixes Q4_K_M ...] [--formats q4_k ...]
                                    [--importance]

Trains a Llama of 2.5 million weights on the built-in corpus (once, minutes on one core; kept in
HAWQKIT_BENCHMARK_CACHE, else `.cache` here), writes it in float32, lets llama.cpp quantize that
file, and gives hawqkit as many bytes as each result has. Every file is then run by llama.cpp on
held-out text and compared with the float32 file; llama.cpp rounds the inputs of quantized matrices
to 8 bits, so the same mixes are also measured by hawqkit, which does not. With --importance both
mixes are also rounded by llama.cpp with mean squares of the inputs, as from an importance matrix;
hawqkit's mix is still the one chosen without. Errors are those of the mean over sequences;
differences are paired by sequence. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hawqkit as hk
from hawqkit.formats import GGUFS
from hawqkit.models.batches import Sequences
from hawqkit.models.corpora import builtin_texts
from hawqkit.models.model import LoadedModel
from hawqkit.records import Allocation
from hawqkit.sensitivity.probing import untracked
from hawqkit.targets.foreign.gguf_files import read_gguf
from hawqkit.targets.gguf_names import layer_tensors, tensor_names
from hawqkit.targets.gguf_writer import write_file
from hawqkit.validation.measuring import measure_text

HOME = Path(__file__).parent
PYTHON = HOME.parent / ".targets" / "llama.cpp" / "bin" / "python"
CONSUMER = HOME.parent / "tests" / "consumers" / "llama_cpp.py"
MIXES = ("Q4_K_M", "IQ4_XS", "Q4_0", "Q3_K_M")
CALIBRATION, WITHHELD, HELD_OUT = 128, 32, 192  # sequences
Array = NDArray[np.float64]
END = "<|endoftext|>"
LENGTH = 128  # tokens of a sequence, in training and measuring
STEPS, BATCH, PEAK = 700, 8, 3e-3


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return byte-level BPE of 512 tokens, split as GPT-2 does, which llama.cpp has a name for."""
    spec = Tokenizer(models.BPE())
    spec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spec.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    spec.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=spec, eos_token=END, bos_token=END)


def train_model(folder: Path) -> None:
    """Train a Llama of 2.5 million weights on the calibration split of the built-in corpus."""
    texts = builtin_texts("calibration")
    tokenizer = train_tokenizer(texts)
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    tokens = torch.tensor([t for text in encoded for t in (*text.ids, 0)])
    generator = torch.Generator().manual_seed(0)
    module = new_module(generator)
    optimizer = torch.optim.AdamW(module.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(STEPS):
        rate = min(1, (step + 1) / 40) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK * rate
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
        rows = torch.stack([tokens[s : s + LENGTH + 1] for s in starts])
        loss = next_token_loss(module, rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"training: step {step} of {STEPS}, loss {loss.item():.3f}", flush=True)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def new_module(generator: torch.Generator) -> Any:
    """Return an untrained Llama whose widths 256 divides, as the k-quants need."""
    module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, 0.02, generator=generator)
    return module


def next_token_loss(module: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy of rows (B, T + 1) of tokens, in nats."""
    logits = module(input_ids=rows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def trained_model() -> LoadedModel:
    """Return the trained model, from the cache where it is there."""
    cache = Path(os.environ.get("HAWQKIT_BENCHMARK_CACHE") or HOME / ".cache")
    folder = cache / f"gguf-llama-{STEPS}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            train_model(Path(scratch) / "model")
            (Path(scratch) / "model").rename(folder)
    return hk.measure_gguf(hk.load_model(str(folder)))


def llama_cpp(*words: object) -> Any:
    """Run the consumer's script, which has llama.cpp's library, and return what it says."""
    if not PYTHON.exists():
        raise SystemExit("no llama.cpp here: make it with `bash .ci/consumer llama.cpp`")
    command = [str(PYTHON), str(CONSUMER), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Figures:
    """What a file does with held-out text: one number for each of S sequences.

    Attributes:
        kl: mean KL(float32 || file) over the sequence's predictions, in nats.
        same: share of predictions whose most likely token is that of float32.
        loss: mean cross-entropy of the true token, in nats.
    """

    kl: Array
    same: Array
    loss: Array

    def row(self) -> str:
        """Return three cells of the table."""
        ppl = math.exp(self.loss.mean())
        return (
            f"{shown(self.kl, '.5f')} | {shown(100 * self.same, '.2f')} % | "
            f"{ppl:.3f} ± {ppl * stderr(self.loss):.3f}"
        )


def stderr(values: Array) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def shown(values: Array, form: str) -> str:
    return f"{values.mean():{form}} ± {stderr(values):{form}}"


def figures(logits: Tensor, original: Tensor, tokens: Tensor) -> Figures:
    """Compare logits (S, T, V) with the original's; the last position of T predicts nothing."""
    p, q = (x[:, :-1].double().log_softmax(-1) for x in (original, logits))
    kl = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    loss = -q.gather(-1, tokens[:, 1:, None])[..., 0]
    return Figures(*(x.mean(-1).numpy() for x in (kl, same, loss)))


def run_file(path: Path, tokens: Tensor) -> Tensor:
    """Return llama.cpp's logits (S, T, V) of a file."""
    inputs, outputs = path.with_name("tokens.npy"), path.with_name("logits.npy")
    np.save(inputs, tokens.numpy())
    llama_cpp("logits", path, inputs, outputs)
    return torch.from_numpy(np.load(outputs))


def run_mixes(
    model: LoadedModel, mixes: Mapping[str, Mapping[str, str]], text: Sequences
) -> dict[str, Figures]:
    """Measure mixes with hawqkit: weights alone are rounded."""
    _, found = measure_text(model, mixes, text, rounding="searched", track=untracked)

    def by_sequence(result: Any, values: Array) -> Array:
        count = np.bincount(result.sequence)
        return np.asarray(np.bincount(result.sequence, weights=values) / count)

    return {
        name: Figures(*(by_sequence(r, v) for v in (r.kl, r.same_top1, r.loss)))
        for name, r in found.items()
    }


def types_of(mix: Mapping[str, str]) -> str:
    count = Counter(mix.values())
    return ", ".join(f"{count[name]} {name}" for name in sorted(count))


def input_squares(model: LoadedModel, text: Sequences) -> dict[str, Array]:
    """Return mean squares of the inputs of linear layers, by the names of their tensors.

    Embeddings are left out, as in an importance matrix by default.
    """
    names = layer_tensors(model.layers, tensor_names(model.facts))
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

        return add

    hooks = [
        model.module.get_submodule(layer.name).register_forward_pre_hook(watch(names[layer.name]))
        for layer in model.layers
        if layer.kind == "linear"
    ]
    rows = text.tokens[~text.withheld]
    with torch.no_grad():
        for some in rows.split(16):
            model.module(input_ids=some)
    for hook in hooks:
        hook.remove()
    return {name: (total / rows.numel()).numpy() for name, total in sums.items()}


@dataclass(frozen=True)
class File:
    """A quantized file and what became of it in llama.cpp.

    Attributes:
        mix: layer -> format.
        weighted: whether it was rounded with an importance matrix, which hawqkit has not.
        predicted: cell of the table.
    """

    name: str
    path: Path
    mix: Mapping[str, str]
    figures: Figures
    weighted: bool = False
    predicted: str = "-"

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on a disk."""
        return self.path.stat().st_size


class Benchmark:
    """Model, text, the float32 file and what it says: all that files are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = trained_model()
        self.text = hk.load_batches(
            "builtin", self.model, split="held-out", sequences=HELD_OUT, length=LENGTH
        )
        self.float = folder / "float.gguf"
        write_file(self.float, self.model, {}, rounding="searched", version=hk.__version__)
        self.original = run_file(self.float, self.text.tokens)

    def calibration(self, seed: int) -> Sequences:
        """Return text to choose by; a part of it only predicts."""
        return hk.load_batches(
            "builtin", self.model, sequences=CALIBRATION, length=LENGTH, seed=seed,
            withheld=WITHHELD,
        )  # fmt: skip

    def file(
        self, name: str, path: Path, mix: Mapping[str, str], *, weighted: bool = False,
        predicted: str = "-",
    ) -> File:  # fmt: skip
        """Run a file, and refuse it unless its tensors have the types of the mix."""
        seen = dict(read_gguf(path, self.model.layers, self.model.facts).layers)
        if seen != {layer.name: mix[layer.name] for layer in self.model.layers}:
            raise SystemExit(f"{name}: the types of {path} are not those of its mix")
        logits = run_file(path, self.text.tokens)
        found = figures(logits, self.original, self.text.tokens)
        return File(name, path, seen, found, weighted, predicted)

    def theirs(self, base: str, importance: Path | None = None, types: str = "") -> File:
        """Quantize the float32 file as `llama-quantize` does.

        Args:
            base: name of the mix.
            importance: .npz of mean squares, by tensor.
            types: content of a file of tensor types, which precede the mix.
        """
        name = f"{'hawqkit for' if types else 'llama.cpp'} {base}"
        path = self.folder / f"{name}.gguf"
        more: list[Path] = []
        if importance is not None:
            name += ", importance"
            more = [self.folder / "types.txt", importance]
            more[0].write_text(types, encoding="utf-8")
        llama_cpp("quantize", self.float, path, base, *more)
        found = read_gguf(path, self.model.layers, self.model.facts)
        if found.unnamed:
            raise SystemExit(f"{base} holds types that hawqkit has no name for: {found.unnamed}")
        return self.file(name, path, found.layers, weighted=importance is not None)

    def ours(self, name: str, allocation: Allocation) -> File:
        """Write an allocation as a GGUF file."""
        path = hk.export(allocation, "gguf", self.folder / name, model=self.model)[0]
        mix = {layer.name: "none" for layer in self.model.layers} | dict(allocation.layers)
        said = allocation.prediction
        cell = f"{said.kl:.5f} ± {said.kl_stderr:.5f}" if said else "-"
        return self.file(name, path, mix, predicted=cell)

    def weighted(self, base: str, allocation: Allocation) -> list[File]:
        """Let llama.cpp round both mixes with the importance that calibration text gives."""
        path = self.folder / "importance.npz"
        np.savez(path, allow_pickle=False, **input_squares(self.model, self.calibration(0)))
        folder = self.folder / f"types for {base}"
        hk.export(allocation, "llama-quantize", folder, model=self.model)
        types = (folder / "tensor-types.txt").read_text(encoding="utf-8")
        files = [self.theirs(base, path), self.theirs(base, path, types)]
        mix = dict(allocation.layers)
        if any(files[1].mix[name] != wanted for name, wanted in mix.items()):
            raise SystemExit(f"llama.cpp gave other types than hawqkit's mix for {base}")
        return files


def main() -> None:
    parser = argparse.ArgumentParser(description="GGUF mixes beside llama.cpp's own.")
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration text")
    parser.add_argument("--mixes", nargs="+", default=MIXES, metavar="NAME")
    formats = [name for name in GGUFS if name != "none"]
    parser.add_argument("--formats", nargs="+", default=formats, metavar="TYPE")
    parser.add_argument("--importance", action="store_true", help="round with importance too")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Benchmark(Path(scratch))
        tables = [
            hk.probe(bench.model, bench.calibration(seed), settings.formats)
            for seed in range(settings.seeds)
        ]
        for base in settings.mixes:
            theirs = bench.theirs(base)
            chosen = [
                hk.allocate(
                    table, size=theirs.nbytes, size_target="gguf", runtime="llama.cpp", draws=0
                )
                for table in tables
            ]
            ours = [bench.ours(f"hawqkit for {base}, seed {s}", c) for s, c in enumerate(chosen)]
            weighted = bench.weighted(base, chosen[0]) if settings.importance else []
            report(bench, theirs, ours, weighted)


def report(bench: Benchmark, theirs: File, ours: Sequence[File], weighted: Sequence[File]) -> None:
    """Print what the files of one size do, and by how much ours differ from llama.cpp's."""
    files = [theirs, *ours, *weighted]
    too_large = [f"{f.name} has {f.nbytes} bytes" for f in files if f.nbytes > theirs.nbytes]
    if too_large:
        raise SystemExit("\n".join([f"{theirs.name} has {theirs.nbytes} bytes", *too_large]))
    alone = run_mixes(bench.model, {f.name: f.mix for f in files if not f.weighted}, bench.text)
    print("\n| file | bytes | KL | same top-1 | perplexity | KL, weights alone | predicted |")
    print("|---|---|---|---|---|---|---|")
    for file in files:
        kl = "-" if file.weighted else shown(alone[file.name].kl, ".5f")
        print(f"| {file.name} | {file.nbytes:,} | {file.figures.row()} | {kl} | {file.predicted} |")
    print("\n| minus llama.cpp's | KL | same top-1, % | loss | KL, weights alone |")
    print("|---|---|---|---|---|")
    pairs = [(theirs, file) for file in ours] + list(
        zip(weighted[::2], weighted[1::2], strict=True)
    )
    for one, other in pairs:
        a, b = one.figures, other.figures
        kl, same, loss = (
            shown(b.kl - a.kl, ".5f"), shown(100 * (b.same - a.same), ".2f"),
            shown(b.loss - a.loss, ".5f"),
        )  # fmt: skip
        rest = "-" if other.weighted else shown(alone[other.name].kl - alone[one.name].kl, ".5f")
        print(f"| {other.name} | {kl} | {same} | {loss} | {rest} |")
    print()
    for file in files[: 1 + len(ours)]:
        print(f"{file.name}: {types_of(file.mix)}", flush=True)


if __name__ == "__main__":
    main()
