"""How to use what a run wrote: the commands that the report shows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hawqkit.records import Allocation
from hawqkit.report.nouns import IMAGES, LABELLED_TEXT, TEXT, Nouns

LOADABLE = "compressed-tensors"  # the target whose folder transformers loads: it comes first


@dataclass(frozen=True, slots=True)
class Usage:
    """A heading, what to know, and a block of commands."""

    title: str
    about: str
    code: str


_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
inputs = tokenizer("The state of the Union is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"""

_LOAD_CLASSIFIER = """\
from transformers import {auto}

model = {auto}.from_pretrained({folder!r})  # gives logits, one of each class"""

_AUTO = {
    IMAGES: "AutoModelForImageClassification",
    LABELLED_TEXT: "AutoModelForSequenceClassification",
}

_READ = """\
import json
from pathlib import Path

layers = json.loads(Path({file!r}).read_text())["layers"]  # layer name -> format name"""


def make_usage(
    allocation: Allocation | None,
    exports: Mapping[str, str | Path] | None,
    nouns: Nouns = TEXT,
) -> tuple[Usage, ...]:
    """Return what can be done with the exports, and with the run itself."""
    found: list[Usage] = []
    order = sorted((exports or {}).items(), key=lambda item: (item[0] != LOADABLE, item[0]))
    for target, folder in order:
        found += _target(target, str(folder), nouns)
    if allocation is not None:
        name, limit = next(iter(sorted(allocation.budgets.items())), ("average_bits", 4.0))
        others = {
            "size": f"{limit * 1.1 / 1e6:.0f}MB",
            "max_predicted_kl": f"{limit / 2:g}",
            "bops": f"{limit * 1.1:.4g}",
            "latency_ms": f"{limit * 1.1:.4g}",
        }
        other = others.get(name, f"{limit + 0.5:g}")
        found.append(
            Usage(
                "Choose again",
                "The measurement holds for every budget: this takes seconds and needs neither the "
                "model nor torch. RUN is the folder of this run.",
                f"hawqkit allocate RUN --budget {name}={other} -o allocation-{other}.json\n"
                "hawqkit show RUN --full",
            )
        )
    return tuple(found)


def _target(target: str, folder: str, nouns: Nouns) -> list[Usage]:
    quoted = shlex.quote(folder)
    if target == LOADABLE and (nouns == TEXT or nouns in _AUTO):
        code = _LOAD if nouns == TEXT else _LOAD_CLASSIFIER
        load = Usage(
            f"Load it in transformers ({folder})",
            "Needs the package compressed-tensors beside transformers. Never load it with "
            "dequantize=True: transformers then decodes every layer with one group's format, "
            "and a mix comes out silently wrong. Stored in 16 bits, it is decoded in 16 bits "
            "unless dtype=torch.float32 is given.",
            code.format(folder=folder, auto=_AUTO.get(nouns)),
        )
        if nouns.classes:
            return [load]
        arguments = shlex.quote(f"pretrained={folder},dtype=float32")
        return [
            load,
            Usage(
                "Evaluate it with lm-eval",
                "Any task of the harness; the numbers can be compared with those of the original.",
                f"lm_eval --model hf --model_args {arguments} "
                "--tasks lambada_openai,arc_easy --batch_size 8",
            ),
        ]
    if target == "bits":
        return [
            Usage(
                f"Read the plain allocation ({folder})",
                "JSON with a schema version; its object layers maps each layer's name to its "
                "format. Any quantizer can be driven from it.",
                _READ.format(file=str(Path(folder) / "bits.json")),
            )
        ]
    return [Usage(f"{target} ({folder})", "What this target wrote lies here.", f"ls {quoted}")]
