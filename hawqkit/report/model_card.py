"""The model card of a pushed export: how it was made, what it costs, how to load it. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hawqkit.records import Allocation, Sensitivities, Validation
from hawqkit.report.comparison import Row, compare, target_names, texts_of
from hawqkit.report.nouns import nouns_for
from hawqkit.report.wording import DASH, fixed, loss_sentence, megabytes, percent, with_error

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_CARD = """\
---
{front}---

# {title}

{source} with the formats below, chosen layer by layer by hawqkit: it measures how much every layer
suffers in every format (Hessian sensitivities, with standard errors) and solves the assignment
under the budget exactly.

| format | layers |
|---|---|
{formats}

Budget: {budget}. Score: `{score}`, of {data}. Certificate: {certificate}.
{loss}
{tables}
## Load it

{loading}
## How it was made

The recipe, with `hawqkit run recipe.yaml`; `allocation.json` beside it holds every layer's format.

```yaml
{recipe}```
"""


def model_card(
    allocation: Allocation,
    sensitivities: Sensitivities,
    validation: Validation | None,
    *,
    repository: str,
    target: str,
    loading: str,
    recipe: str,
) -> str:
    """Return a README for a model hub: Markdown under a YAML head.

    Args:
        allocation: the mix that was exported, with its baselines.
        sensitivities: what it was chosen from.
        validation: what was measured of the mixes; None leaves that table out.
        repository: `USER/NAME`, the title.
        target: who reads the files.
        loading: what the target's own README says of loading, Markdown.
        recipe: YAML, as `published_recipe` gives it.
    """
    data, source = sensitivities.data, _name(sensitivities.model.source)
    proof = allocation.certificate
    counts = Counter(allocation.layers.values())
    return _CARD.format(
        front=_front(sensitivities, target),
        title=_plain(repository),
        source=_plain(source),
        formats="\n".join(f"| {name} | {n} |" for name, n in sorted(counts.items())),
        budget=", ".join(f"{name} {limit:g}" for name, limit in allocation.budgets.items()),
        score=allocation.score,
        data=f"{data.sequences} {nouns_for(sensitivities).many} ({_plain(_name(data.source))})",
        certificate=f"{proof.status}, relative gap {proof.relative_gap:.1e}, by {proof.solver}",
        loss=loss_sentence(allocation.loss),
        tables=_tables(compare(allocation, validation), validation),
        loading=loading.strip() + "\n",
        recipe=recipe,
    )


def published_recipe(text: str) -> str:
    """Return a recipe in which every path is cut to its last part: folders are nobody's business.

    >>> print(published_recipe("model: {source: /data/models/tiny}"), end="")
    model:
      source: tiny
    """

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(each) for key, each in value.items()}
        if isinstance(value, list):
            return [cut(each) for each in value]
        return _name(value) if isinstance(value, str) else value

    shown: str = yaml.safe_dump(cut(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
    return shown


def _name(source: str) -> str:
    return Path(source).name if source.startswith(("/", "~", "\\")) else source


def _front(sensitivities: Sensitivities, target: str) -> str:
    source = sensitivities.model.source
    head: dict[str, Any] = {"tags": ["hawqkit", "mixed-precision", "quantized", target]}
    if target == "compressed-tensors":
        head["library_name"] = "transformers"
    if _HUB_ID.fullmatch(source):
        head |= {"base_model": source, "base_model_relation": "quantized"}
    front: str = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return front


def _tables(rows: Sequence[Row], validation: Validation | None) -> str:
    """Return what each mix takes and loses, and on which text that was measured."""
    targets, texts = target_names(list(rows)), texts_of(validation)
    heads = ["mix", "average bits", "bits per weight", *(f"{t} MB" for t in targets)]
    heads += [
        "predicted KL",
        *(f"KL on {t}" for t in texts),
        *(f"same top-1 on {t}" for t in texts),
    ]
    lines = [f"| {' | '.join(map(_plain, heads))} |", "|" + "---|" * len(heads)]
    for row in rows:
        sizes, p = row.totals, row.prediction
        measured = [row.measured.get(text) for text in texts]
        cells = [
            row.name,
            fixed(sizes.average_bits, 3),
            fixed(sizes.bits_per_weight, 3),
            *(megabytes(sizes.size.get(t)) for t in targets),
            DASH if p is None else with_error(p.kl, p.kl_stderr),
            *(DASH if m is None else with_error(m.kl, m.kl_stderr) for m in measured),
            *(DASH if m is None else percent(m.same_top1) for m in measured),
        ]
        lines.append(f"| {' | '.join(map(_plain, cells))} |")
    note = "KL is to the original model, in nats a prediction, with standard errors"
    where = f", measured on {', '.join(texts)} data that the choice had not seen" if texts else ""
    return "\n".join([*lines, "", f"{note}{where}.", ""])


def _plain(text: object) -> str:
    """Return text that Markdown shows as it is, in one line of a table."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
