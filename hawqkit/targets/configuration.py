"""What targets have in common that write names and settings, and no weights.

An export of such a target is a folder of four files:

    <the configuration>   in the consumer's own syntax, its name is the target's
    apply.py              applies it with the consumer's library: `python apply.py MODEL OUTPUT`
    hawqkit.json          the mark of an export, with the mix: {"kind": "hawqkit-configuration",
                          "schema", "target", "version", "model": {"source", "hash"}, "rounding",
                          "runtime", "budgets", "layers": {name: {"format", "bits", "group_size",
                          "symmetric"}}}; a layer that stays as it is has "bits": null
    NOTE.md               for which rounding the prediction holds, and the commands

`apply.py` is a copy of a file of `hawqkit/targets/scripts/`: names of layers are data that it reads
from the files beside it, never a part of its code.

The consumers decide by patterns, prefixes, or the last entry that matches. So after the text was
made it is parsed again, and every module of the model is decided by the consumer's own rule: see
`matching.verify`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqkit import __version__
from hawqkit.errors import HawqkitError
from hawqkit.formats import Format, parse_format
from hawqkit.records import Allocation, Layer, ModelFacts
from hawqkit.runtimes import group_key
from hawqkit.targets.contract import Capabilities, choice_problem
from hawqkit.targets.folders import published

MARK = "hawqkit.json"
SCRIPT = "apply.py"
NOTE = "NOTE.md"
KIND = "hawqkit-configuration"
SCHEMA = 1

SHOWN_FORMATS = 12  # that a problem lists: some targets hold forty

_CONSUMER_ROUNDS = {
    "nearest": "to the nearest value of a grid from the largest entry",
    "searched": "to the nearest value of a grid whose scale was searched for the smallest error",
}


@dataclass(frozen=True, slots=True)
class Consumer:
    """How the words of `NOTE.md` go for one consumer.

    Attributes:
        title: its name as people write it.
        requirement: what to install, with the version that was tested.
        rounding: how it rounds by itself, as the end of a sentence.
        agrees: roundings of hawqkit that give the same numbers, none if all differ.
        nearest: format name -> whether it is rounded as hawqkit's `nearest` does, where that
            depends on the format.
        more: paragraphs about loading the result, or traps.
    """

    title: str
    requirement: str
    rounding: str
    agrees: tuple[str, ...] = ()
    more: str = ""
    nearest: Callable[[str], bool] | None = None

    def rounds_as(self, allocation: Allocation) -> bool:
        """Whether every layer of a mix gets the numbers that hawqkit measured."""
        if allocation.rounding in self.agrees:
            return True
        if allocation.rounding != "nearest" or self.nearest is None:
            return False
        return all(self.nearest(name) for name in allocation.layers.values() if name != "none")


def problems_of(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts, can: Capabilities
) -> list[str]:
    """Return everything that a target cannot hold, each with the layer and what would fit.

    Args:
        mix: layer name -> format name.
        layers: all layers of the model.
        facts: of the model; without a transformers configuration nothing can be loaded again.
        can: what the target holds.
    """
    found = []
    if not facts.config.get("model_type"):
        found.append(
            f"model {facts.source!r}: it has no transformers configuration, so the quantizer "
            "cannot load it from a folder; export 'bits'."
        )
    known = {layer.name: layer for layer in layers}
    for name, format_name in mix.items():
        problem = choice_problem(name, format_name, known)
        if problem is not None:
            found.append(problem)
        elif parse_format(format_name).quantizes:
            found += _layer_problems(known[name], parse_format(format_name), can)
    if can.shares is not None:
        found += sharing_problems(mix, can.shares)
    if not can.mixed:
        sound = {n: f for n, f in mix.items() if choice_problem(n, f, known) is None}
        found += _one_format_problems({n: f for n, f in sound.items() if can.hold(parse_format(f))})
    return found


def _layer_problems(layer: Layer, format: Format, can: Capabilities) -> list[str]:
    keep = f"keep it ('none'), or exclude it with `layers.exclude: [{layer.name}]`"
    found = []
    if layer.kind not in can.kinds:
        found.append(
            f"it is of kind {layer.kind!r}, and this target quantizes {', '.join(can.kinds)} "
            f"alone; {keep}."
        )
    elif layer.tied and not can.tied:
        found.append(
            f"its weight is shared with {', '.join(map(repr, layer.tied))}, which the consumer "
            f"would not quantize with it; {keep}."
        )
    for what, count, multiple in (
        ("rows", layer.rows, can.rows_multiple),
        ("columns", layer.columns, can.columns_multiple),
    ):
        if count % multiple:
            found.append(
                f"it has {count} {what}, and the consumer quantizes multiples of {multiple} "
                f"alone; {keep}."
            )
    if not can.hold(format):
        found.append(f"this target cannot hold the format; {would_fit(format, layer, can)}.")
    return [f"layer {layer.name!r} in format {format.name!r}: {text}" for text in found]


def would_fit(format: Format, layer: Layer, can: Capabilities) -> str:
    """Return the formats that a target can hold for a layer, those of the same width first.

    >>> from hawqkit.targets.contract import IntegerFormats
    >>> layer = Layer("up", "linear", rows=8, columns=96, dtype="float32")
    >>> can = Capabilities((IntegerFormats((4, 8)),))
    >>> would_fit(parse_format("int8-g32-asym"), layer, can)
    'these fit: int8-g32, int8-channel, int4-g32, int4-channel, none'
    """
    names = [n for n in can.formats() if parse_format(n).fits(layer.columns)]
    width = format.bits or 0
    names.sort(key=lambda n: abs((parse_format(n).bits or 99) - width))  # stable: else coarsest
    shown = [n for n in names if n != "none"][:SHOWN_FORMATS]
    more = len(names) - 1 - len(shown)
    tail = f" and {more} more" if more > 0 else ""
    return f"these fit: {', '.join([*shown, 'none'])}{tail}"


def _one_format_problems(mix: Mapping[str, str]) -> list[str]:
    chosen: dict[str, list[str]] = {}
    for name, format_name in mix.items():
        if format_name != "none":
            chosen.setdefault(format_name, []).append(name)
    if len(chosen) < 2:
        return []
    most = max(chosen, key=lambda n: len(chosen[n]))
    return [
        f"layer {name!r} in format {format_name!r}: this target quantizes all layers to one "
        f"format or keeps them, and most layers of this mix have {most!r}; {most!r} or 'none' fits."
        for format_name, names in chosen.items()
        if format_name != most
        for name in names
    ]


def sharing_problems(mix: Mapping[str, str], runtime: str) -> list[str]:
    """Return the layers that a runtime fuses and that do not share a format.

    >>> sharing_problems({"a.q_proj": "int4-g32", "a.k_proj": "int8-g32"}, "vllm")[0][:57]
    "layers 'a.q_proj', 'a.k_proj' in formats 'int4-g32', 'int"
    """
    groups: dict[str, list[str]] = {}
    for name in mix:
        groups.setdefault(group_key(name, runtime), []).append(name)
    return [
        f"layers {', '.join(map(repr, members))} in formats "
        f"{', '.join(repr(mix[m]) for m in members)}: they are one matrix in runtime {runtime!r} "
        f"and must share a format; allocate with `runtime: {runtime}`."
        for members in groups.values()
        if len({mix[m] for m in members}) > 1
    ]


def range_problems(allocation: Allocation) -> list[str]:
    """Return the layers whose inputs were measured otherwise than the consumer rounds them."""
    ranges = allocation.activations
    if ranges is None or (ranges.mode == "dynamic" and ranges.symmetric):
        return []
    kind = "symmetric" if ranges.symmetric else "asymmetric"
    return [
        f"layer {name!r} in format {format_name!r}: its inputs were measured with {ranges.mode} "
        f"{kind} ranges, and this target rounds them dynamically and symmetrically; set "
        "`activations: {mode: dynamic, symmetric: true}` in the recipe."
        for name, format_name in allocation.layers.items()
        if parse_format(format_name).activation_bits is not None
    ]


def module_names(layers: Sequence[Layer], facts: ModelFacts) -> tuple[str, ...]:
    """Return the modules of a model that own a matrix: its layers, and all that are no layers."""
    names = [name for layer in layers for name in (layer.name, *layer.tied)]
    owners = [
        tensor.name.removesuffix(".weight")
        for tensor in facts.tensors
        if len(tensor.shape) >= 2 and tensor.name.endswith(".weight")
    ]
    head = ["lm_head"] if facts.config.get("tie_word_embeddings") else []
    return tuple(dict.fromkeys([*names, *owners, *head]))


def kept_names(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> tuple[str, ...]:
    """Return the modules with a matrix that stay as they are, whoever else would quantize them."""
    return tuple(n for n in module_names(layers, facts) if mix.get(n, "none") == "none")


def json_text(content: Any) -> str:
    """Return JSON in ASCII, so that a name of any characters can be written and read anywhere."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def script(name: str) -> str:
    """Return the text of the script that applies a configuration, `hawqkit/targets/scripts/`."""
    return (Path(__file__).parent / "scripts" / f"{name}.py").read_text(encoding="utf-8")


def mark_text(
    target: str, allocation: Allocation, layers: Sequence[Layer], facts: ModelFacts
) -> str:
    """Return `hawqkit.json`: what was written, of which model, and the mix."""
    taken = {
        layer.name: parse_format(allocation.layers.get(layer.name, "none")) for layer in layers
    }
    content = {
        "kind": KIND,
        "schema": SCHEMA,
        "target": target,
        "version": __version__,
        "model": {"source": facts.source, "hash": facts.hash},
        "rounding": allocation.rounding,
        "runtime": allocation.runtime,
        "budgets": dict(allocation.budgets),
        "layers": {
            name: {
                "format": f.name,
                "bits": f.bits,
                "group_size": f.group_size,
                "symmetric": f.symmetric,
            }
            for name, f in taken.items()
        },
    }
    return json_text(content)


def note_text(allocation: Allocation, consumer: Consumer) -> str:
    """Return `NOTE.md`: for which rounding the prediction holds, and what to run."""
    count: dict[str, int] = {}
    for format_name in allocation.layers.values():
        count[format_name] = count.get(format_name, 0) + 1
    rows = "\n".join(f"| `{name}` | {number} |" for name, number in sorted(count.items()))
    holds = consumer.rounds_as(allocation)
    about = _CONSUMER_ROUNDS.get(allocation.rounding, allocation.rounding)
    said = (
        "the same as here, so that the prediction holds for what it makes"
        if holds
        else "not as here: the prediction ranks the layers, and the loss of what it makes has to "
        "be measured"
    )
    return _NOTE.format(
        consumer=consumer, rounding=allocation.rounding, about=about, said=said, rows=rows,
        script=SCRIPT, more=f"\n{consumer.more.strip()}\n" if consumer.more else "",
    )  # fmt: skip


_NOTE = """\
# A mix of formats for {consumer.title}, chosen by hawqkit

| format | layers |
|---|---|
{rows}

## Apply it
```
pip install "{consumer.requirement}"
python {script} PATH/TO/MODEL PATH/TO/OUTPUT
```
The script reads the mix from the files beside it, and ends with an error if a layer did not get
exactly its format.

## For which rounding the prediction holds
hawqkit's figures were made for weights rounded {about} (`{rounding}`).
{consumer.title} rounds {consumer.rounding}, {said}.
{more}"""


def write_configuration(
    folder: Path, files: Mapping[str, str], is_export: Callable[[Path], bool]
) -> list[Path]:
    """Write texts into a folder that appears at once or not at all, and return their paths.

    Args:
        folder: where they shall lie; an earlier export is replaced.
        files: plain file name -> text.
        is_export: says of an existing folder whether an earlier export wrote it, see `marked`.

    Raises:
        HawqkitError: a file name is not plain.
        InputError: the folder holds something else; nothing is changed.
    """
    wrong = [name for name in files if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)]
    if wrong:
        raise HawqkitError(f"file names {wrong} are not plain: this is an error in hawqkit.")
    with published(Path(folder), is_export) as place:
        for name, text in files.items():
            (place / name).write_text(text, encoding="utf-8", newline="\n")
    return [Path(folder) / name for name in files]


def write_all(
    target: str,
    consumer: Consumer,
    allocation: Allocation,
    folder: Path,
    layers: Sequence[Layer],
    facts: ModelFacts,
    configuration: Mapping[str, str],
) -> list[Path]:
    """Write the four files of an export: see the module.

    Args:
        target: name of the target; its script is `scripts/<name with underscores>.py`.
        consumer: the words of the note.
        allocation: checked before.
        folder: where they shall lie.
        layers: of the model.
        facts: of the model.
        configuration: file name -> text in the consumer's syntax, verified before.
    """
    files = {
        **configuration,
        SCRIPT: script(target.replace("-", "_")),
        MARK: mark_text(target, allocation, layers, facts),
        NOTE: note_text(allocation, consumer),
    }
    return write_configuration(folder, files, marked(target))


def marked(target: str) -> Callable[[Path], bool]:
    """Return what says of a folder whether an earlier export of a target wrote it."""

    def is_export(folder: Path) -> bool:
        try:
            content = json.loads((folder / MARK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return (
            isinstance(content, dict)
            and content.get("kind") == KIND
            and content.get("target") == target
        )

    return is_export
