"""gguf: a file that llama.cpp runs, every layer in a type of its own.

    model.gguf          weights, configuration and tokenizer
    quantization.json   layer name -> format name, and the model that they belong to
    README.md           what it holds, how to run it

Two ways lead to it. A model that was loaded from a GGUF file keeps that file's key-values and all
tensors that the mix does not change, byte by byte; 'none' is then the type that the file has. A
model of transformers (families of `gguf_names.FAMILIES`) is converted: names, order of rows,
configuration and tokenizer.

Sizes are exact, because a mix changes nothing but data: `measure_gguf` lays the file out once and
notes it in the model's facts. This module needs no torch; `gguf_writer` writes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hawqkit import __version__
from hawqkit.errors import Unsupported
from hawqkit.formats import GGUF, format_names, parse_format
from hawqkit.records import Allocation, Integers, Layer, ModelFacts
from hawqkit.targets.configuration import problems_of
from hawqkit.targets.contract import Capabilities, mix_problems, require
from hawqkit.targets.folders import published
from hawqkit.targets.gguf_layout import Layout, from_plain
from hawqkit.targets.gguf_metadata import configuration_problems, notes
from hawqkit.targets.gguf_names import FAMILIES, layer_tensors, tensor_names

if TYPE_CHECKING:
    from hawqkit.models.model import LoadedModel

NAME = "gguf"
ABOUT = "model.gguf: weights in llama.cpp's types, for llama.cpp and what is built on it"
RUNTIMES: tuple[str, ...] = ("llama.cpp",)
SIZED = True

FILE = "model.gguf"
BITS = "quantization.json"
README = "README.md"
KIND = "hawqkit-gguf"
SCHEMA = 1

_CAN = Capabilities(
    names=tuple(name for name in format_names(GGUF) if name != "none"),
    kinds=("linear", "embedding"),
    tied=True,
)

_README = """\
# {title}, quantized by hawqkit

`{file}` holds each layer in a type of its own; `{bits}` says which.

| type | tensors | weights |
|---|---|---|
{rows}

## Run it
It needs llama.cpp, or what is built on it, and no hawqkit.
```
llama-cli -m {file} -p "Once upon a time"
llama-perplexity -m {file} -f some.txt
```
{more}"""


def capabilities() -> Capabilities:
    """Return what a GGUF file can hold: its own types, tied embeddings included."""
    return _CAN


def problems(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> list[str]:
    """Return everything that the target cannot hold, each with the layer and what would fit.

    Raises:
        Unsupported: the package `gguf` is missing.
    """
    found = problems_of(mix, layers, facts, _CAN)
    if not facts.config.get("model_type"):
        return found
    known = facts.config["model_type"] in FAMILIES
    if not facts.source.endswith(".gguf") or not known:
        found = configuration_problems(facts) + found
    if not known:
        return found
    placed = layer_tensors(layers, tensor_names(facts))
    return found + [
        f"layer {layer.name!r} in format {mix[layer.name]!r}: llama.cpp knows no tensor of that "
        f"name; keep it ('none'), or exclude it with `layers.exclude: [{layer.name}]`."
        for layer in layers
        if layer.name not in placed and mix.get(layer.name, "none") != "none"
    ]


def measure_gguf(model: LoadedModel) -> LoadedModel:
    """Return the model with the layout of its GGUF file in its facts.

    With that, `size` is exact. Probe the model that comes back.

    Args:
        model: a causal language model.

    Raises:
        Unsupported: no GGUF file of it can be written, for which the message has the reasons, or
            the package `gguf` is missing.
        InputError: the file that it was loaded from is gone.
    """
    from hawqkit.targets.gguf_writer import layout_of

    require(NAME, problems({}, model.layers, model.facts))
    layout = layout_of(model, __version__)
    return replace(model, facts=replace(model.facts, gguf=layout.plain()))


def size_table(
    layers: Sequence[Layer], formats: Sequence[str], facts: ModelFacts
) -> tuple[Integers, int]:
    """Return bytes (L, F) of each choice, and the bytes that no choice changes.

    Exact but for the line of the README that a type takes.

    Raises:
        Unsupported: the file was not laid out, see `measure_gguf`.
    """
    layout = _layout(facts)
    places = {place.layer: place for place in layout.places if place.layer}
    costs = np.zeros((len(layers), len(formats)), dtype=np.int64)
    kept = np.zeros(len(layers), dtype=np.int64)
    for row, layer in enumerate(layers):
        place = places.get(layer.name)
        for column, name in enumerate(("none", *formats)):
            format_ = parse_format(name)
            if not format_.fits(layer.columns) or not _CAN.hold(format_):
                continue
            data = layout.padded(place.bytes_in(format_)) if place is not None else 0
            cost = data + len(_line(layer.name, name).encode())
            if column == 0:
                kept[row] = cost
            else:
                costs[row, column - 1] = cost
    return costs, int(size({}, layers, facts) - kept.sum())


def size(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> int:
    """Return the bytes of all files that `write` writes for this mix, equal to the byte.

    Raises:
        Unsupported: the target cannot hold the mix, or the file was not laid out (`measure_gguf`).
    """
    require(NAME, mix_problems(mix, layers))
    layout = _layout(facts)
    texts = bits_text(mix, layers, facts) + readme(mix, layout, facts)
    return layout.file_bytes(mix) + len(texts.encode())


def _layout(facts: ModelFacts) -> Layout:
    if not facts.gguf:
        raise Unsupported(
            f"the bytes of target {NAME!r} are known once the file of {facts.source!r} was laid "
            "out: call measure_gguf(model) before probing, or use the budget bits_per_weight."
        )
    return from_plain(facts.gguf)


def bits_text(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> str:
    """Return `quantization.json`."""
    head = {
        "kind": KIND,
        "schema": SCHEMA,
        "version": __version__,
        "model": {"source": facts.source, "hash": facts.hash},
    }
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}," for k, v in head.items()]
    entries = "".join(_line(x.name, mix.get(x.name, "none")) for x in layers)
    return "\n".join(["{", *lines, '  "layers": {']) + entries.rstrip(",") + "\n  }\n}\n"


def _line(name: str, format_name: str) -> str:
    return f"\n    {json.dumps(name)}: {json.dumps(format_name)},"


def readme(mix: Mapping[str, str], layout: Layout, facts: ModelFacts) -> str:
    """Return README.md: what the file holds, how to run it, what llama.cpp does otherwise."""
    count: Counter[str] = Counter()
    entries: Counter[str] = Counter()
    for place, format_ in layout.chosen(mix):
        count[place.type_in(format_)] += 1
        entries[place.type_in(format_)] += int(np.prod(place.shape, dtype=np.int64))
    more = notes(facts)
    return _README.format(
        title=json.dumps(facts.source, ensure_ascii=False)[1:-1],  # no newline ends the heading
        file=FILE,
        bits=BITS,
        rows="\n".join(f"| {n} | {count[n]} | {entries[n]:,} |" for n in sorted(count)),
        more="".join(f"\n{note}\n" for note in more),
    )


def write(allocation: Allocation, folder: Path, model: LoadedModel) -> list[Path]:
    """Write the file, the formats and a README; see `contract.Target.write`.

    Weights are rounded from the model in memory, by ggml's own code.

    Raises:
        Unsupported: the target cannot hold the mix, or no file of this model can be written; the
            packages of the extra `gguf` are missing.
        NumericalError: a weight is not finite, or too large for its type.
        InputError: the folder holds something else, or the file that the model was loaded from is
            gone; nothing is changed.
    """
    from hawqkit.targets.gguf_writer import write_file

    mix, facts = allocation.layers, model.facts
    require(NAME, problems(mix, model.layers, facts))
    with published(Path(folder), is_export) as place:
        layout = write_file(
            place / FILE, model, mix, rounding=allocation.rounding, version=__version__
        )
        (place / BITS).write_bytes(bits_text(mix, model.layers, facts).encode())
        (place / README).write_bytes(readme(mix, layout, facts).encode())
    return [Path(folder) / name for name in (FILE, BITS, README)]


def write_from_facts(
    allocation: Allocation, folder: Path, layers: Sequence[Layer], facts: ModelFacts
) -> list[Path]:
    """Refuse: the file holds the weights, which the records of a run do not.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(
        f"target {NAME!r} writes weights: give the model, as `load_model` loads it, or export "
        "'llama-quantize'."
    )


def is_export(folder: Path) -> bool:
    """Whether an earlier export of this target wrote a folder."""
    try:
        content = json.loads((folder / BITS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND
