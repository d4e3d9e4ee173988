from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from synthetic import make_run

from hawqkit.models.model import wrap_model
from hawqkit.targets import TARGETS, bits, compressed_tensors
from hawqkit.targets.contract import MOST_PROBLEMS

PAGE = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
NAMES_ARE_DATA = {"budgets", "totals.size", "layers"}  # keys in these are names, not the layout


def paths(content: dict[str, Any], within: str = "") -> Iterator[str]:
    for key, value in content.items():
        path = f"{within}{key}"
        if isinstance(value, dict) and path not in NAMES_ARE_DATA:
            yield from paths(value, f"{path}.")
        else:
            yield path


def test_the_page_documents_every_key_of_bits_json_and_no_other() -> None:
    run = make_run()
    document = bits.document(run.allocation, run.sensitivities.model)
    layout = PAGE.split("## The layout of `bits.json`")[1].split("## ")[0]
    documented = re.findall(r"^\| `([\w.]+)` \|", layout, re.MULTILINE)
    assert documented == list(paths(document))
    assert f"Schema version {document['schema']}." in layout
    assert f"| {document['schema']}, the version of this table |" in layout
    assert f"`{document['kind']}`" in layout


def test_the_page_names_every_target_and_how_many_problems_a_message_lists() -> None:
    for name in TARGETS:
        assert f"| `{name}` |" in PAGE
    assert MOST_PROBLEMS == 10
    assert "a message lists ten of them" in PAGE
    assert "(docs/export.md)" in (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize(
    ("module", "format_name", "row", "reason"),
    [
        (pico.llama, "int4-g64-asym", "formats with a zero point", "zero points do not load"),
        (pico.gpt2, "int4-g64", "a Conv1D (GPT-2)", "Conv1D"),
        (lambda: pico.llama(tied=True), "int4-g64", "an embedding", "it is an embedding"),
        (pico.mixtral, "int4-g32", "experts are stored one by one", "experts are stored one by"),
        (
            lambda: torch.nn.Sequential(torch.nn.Embedding(7, 64), torch.nn.Linear(64, 7)),
            "none",
            "a module without a transformers configuration",
            "no transformers configuration",
        ),
    ],
)
def test_what_the_page_says_is_refused_is_refused(
    module: Any, format_name: str, row: str, reason: str
) -> None:
    model = wrap_model(module(), name="pico")
    mix = {layer.name: format_name for layer in model.layers}
    found = compressed_tensors.problems(mix, model.layers, model.facts)
    assert any(reason in problem for problem in found), found
    assert row in PAGE.split("## What each target refuses")[1]
