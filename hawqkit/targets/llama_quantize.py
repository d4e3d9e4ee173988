r"""llama-quantize: `tensor-types.txt`, types by regular expressions on the names of tensors.

    ^token_embd\.weight$=q6_k
    ^blk\.0\.attn_q\.weight$=q4_k

llama.cpp's tool reads words between blanks, turns what stands before `=` to lower case, and takes
the first expression that is found anywhere in a tensor's name (`std::regex_search`): `blk.1.` would
hit `blk.11.`, so each is anchored. There are no comments. A tensor that no expression hits gets
what the tool thinks best, so those that stay are listed as well. A type that does not fit a
tensor's columns is replaced by another with no more than a line in the log; here it is refused.

The tool reads a GGUF file in float, as llama.cpp's `convert_hf_to_gguf.py` makes it from a folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hawqkit.formats import GGUF, format_names, parse_format
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.configuration import Consumer
from hawqkit.targets.configured import Configured
from hawqkit.targets.contract import Capabilities
from hawqkit.targets.gguf_layout import PLAIN_OF
from hawqkit.targets.gguf_names import architecture_of, layer_tensors, tensor_names
from hawqkit.targets.matching import first_search, quoted_regex, verify

NAME = "llama-quantize"
ABOUT = "tensor-types.txt for llama.cpp's llama-quantize, with a script that runs it"
RUNTIMES: tuple[str, ...] = ("llama.cpp",)
SIZED = False

FILE = "tensor-types.txt"

CONSUMER = Consumer(
    title="llama.cpp's llama-quantize",
    requirement="gguf>=0.10",
    rounding="by ggml's own code, which hawqkit calls as well",
    agrees=("nearest", "searched"),
    more="PATH/TO/MODEL is a GGUF file in float, as `convert_hf_to_gguf.py --outtype auto` makes\n"
    "it; `llama-quantize` of llama.cpp must be on the path, or named in `LLAMA_QUANTIZE`.\n\n"
    "With `--imatrix FILE` scales are chosen for the inputs of a text. That loses less, most of\n"
    "all at few bits, and the prediction then holds no more than the order of the layers.",
)

_CAN = Capabilities(
    names=tuple(name for name in format_names(GGUF) if name != "none"),
    kinds=("linear", "conv1d", "embedding"),
    tied=True,
)


def capabilities() -> Capabilities:
    """Return what llama-quantize writes."""
    return _CAN


def own_problems(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> list[str]:
    """Return the layers whose tensors llama.cpp does not know.

    Raises:
        Unsupported: the package `gguf`, which knows names of tensors, is missing.
    """
    if not facts.config.get("model_type"):
        return []
    if architecture_of(facts) is None:
        kind = facts.config["model_type"]
        unknown = f"model {facts.source!r}: llama.cpp knows no models of type {kind!r}; "
        return [unknown + "export 'bits'."]
    placed = layer_tensors(layers, tensor_names(facts))
    return [
        f"layer {layer.name!r}: llama.cpp knows no tensor of that name, so it would be left out; "
        f"keep it ('none'), or exclude it with `layers.exclude: [{layer.name}]`."
        for layer in layers
        if layer.name not in placed and mix.get(layer.name, "none") != "none"
    ]


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    wanted = tensor_types(mix, layers, facts)
    text = types_text(wanted)
    verify(NAME, entries(text), first_search, wanted, wanted)
    return {FILE: text}


def tensor_types(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return name of a tensor -> its type, for every matrix of the model.

    Args:
        mix: layer name -> format name.
        layers: of the model.
        facts: of the model.
    """
    names = tensor_names(facts)
    chosen = {tensor: layer for layer, tensor in layer_tensors(layers, names).items()}
    found = {}
    for tensor in facts.tensors:
        name = names.get(tensor.name, "")
        if len(tensor.shape) < 2 or not name.endswith(".weight") or "_norm." in name:
            continue
        format_ = parse_format(mix.get(chosen.get(name, ""), "none"))
        found[name] = format_.element if format_.quantizes else PLAIN_OF.get(tensor.dtype, "f32")
    return found


def types_text(types: Mapping[str, str]) -> str:
    r"""Return the lines of the file.

    >>> print(types_text({"blk.0.attn_q.weight": "q4_k"}), end="")
    ^blk\.0\.attn_q\.weight$=q4_k
    """
    return "".join(f"{quoted_regex(name)}={kind}\n" for name, kind in types.items())


def entries(text: str) -> list[tuple[str, Any]]:
    """Return (expression, type) as the tool reads them: words, the name in lower case."""
    words = (word.partition("=") for word in re.split(r"[ \t\n\v\f\r]+", text) if word)
    return [(name.lower(), kind.lower()) for name, _, kind in words]


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration, own_problems)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
