"""exllamav3: `recipe.yaml`, bits by the keys of tensors.

    target_bpw: 4.25
    head_bits: 16
    tensors:
      model.layers.0.mlp.up_proj: 4
      model.layers.0.mlp.down_proj: 16

Bits are 1 to 8, 16 keeps a tensor. Every linear layer of the blocks must be covered, and nothing
else may be named: the head has its own setting, embeddings are kept. A key with `*`, `?` or `[` is
a glob, and the last entry that matches decides, exact key or glob (exllamav3 1.6.5, read; it needs
a CUDA device to run, so nothing here has run it).

Its format is a trellis of its own, with scales for rows and columns: of hawqkit's formats those
with one scale a row stand for it, by their width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hawqkit.formats import parse_format
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.configuration import Consumer, kept_names, module_names
from hawqkit.targets.configured import Configured
from hawqkit.targets.contract import Capabilities, IntegerFormats
from hawqkit.targets.matching import last_glob, quoted_glob, verify

NAME = "exllamav3"
ABOUT = "recipe.yaml for exllamav3, with a script that runs it on a CUDA device (not run here)"
RUNTIMES: tuple[str, ...] = ("exllamav3",)
SIZED = False

FILE = "recipe.yaml"
HEAD = "lm_head"
KEPT = 16
_IN_BLOCK = re.compile(r"\.\d+\.")

CONSUMER = Consumer(
    title="exllamav3",
    requirement="exllamav3==1.6.5",
    rounding="to a trellis, column by column with the errors passed on (QTIP, LDLQ)",
    more="It needs a CUDA device. hawqkit's tests read this recipe with exllamav3's rules and\n"
    "have not run it. A trellis loses less than rounding at the same width, most of all at few\n"
    "bits.\n\n"
    "Load the output with exllamav3, for example in TabbyAPI.",
)


def capabilities() -> Capabilities:
    """Return the widths of a trellis, each as the format with one scale a row."""
    return Capabilities(integers=(IntegerFormats((2, 3, 4, 5, 6, 8), (None,)),))


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    wanted = bits_of(mix, layers, facts)
    head = wanted.pop(HEAD, KEPT)
    text = recipe_text(wanted, head, layers)
    parsed: dict[str, Any] = yaml.safe_load(text)["tensors"]
    names = [name for name in module_names(layers, facts) if name != HEAD]
    verify(NAME, list(parsed.items()), last_glob, names, wanted)
    return {FILE: text}


def bits_of(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> dict[str, int]:
    """Return the bits of every layer that the recipe must cover, and of the head."""
    embeddings = {layer.name for layer in layers if layer.kind == "embedding"}
    kept = (n for n in kept_names(mix, layers, facts) if _IN_BLOCK.search(n))
    found = {name: KEPT for name in kept if name not in embeddings}
    chosen = {name: parse_format(format_name).bits for name, format_name in mix.items()}
    return found | {name: bits for name, bits in chosen.items() if bits is not None}


def recipe_text(bits: Mapping[str, int], head: int, layers: Sequence[Layer]) -> str:
    """Return `recipe.yaml`.

    Args:
        bits: layer name -> bits, without the head.
        head: bits of the head.
        layers: of the model; weights that are kept do not count in `target_bpw`.
    """
    weights = {layer.name: layer.rows * layer.columns for layer in layers}
    counted = {name: b for name, b in bits.items() if b != KEPT}
    total = sum(weights[name] for name in counted)
    mean = sum(weights[name] * b for name, b in counted.items()) / total if total else KEPT
    tensors = {quoted_glob(name): value for name, value in bits.items()}
    recipe = {"target_bpw": round(mean, 4), "head_bits": head, "tensors": tensors}
    text: str = yaml.safe_dump(recipe, sort_keys=False, width=10_000)
    return text


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
