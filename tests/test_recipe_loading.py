from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from hawqkit.errors import RecipeError
from hawqkit.recipe import Recipe, load_budget, load_recipe, parse_bytes

SOUND = """\
model: {source: somewhere}
formats: [int4-g64, int8-g64]
budget: {average_bits: 4.5}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(text)
    return file


def problems(folder: Path, text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_what_a_recipe_leaves_out_has_the_documented_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SOUND))
    assert (recipe.calibration.sequences, recipe.calibration.length) == (64, 256)
    assert (recipe.calibration.split, recipe.calibration.withheld) == ("calibration", 32)
    assert (recipe.held_out.split, recipe.held_out.sequences) == ("held-out", 16)
    assert recipe.other_texts == {}
    assert (recipe.layers.include, recipe.layers.exclude) == (("*",), ("lm_head",))
    assert (recipe.layers.misfits, recipe.rounding, recipe.runtime) == (
        "refuse",
        "searched",
        "transformers",
    )
    assert recipe.sensitivity.model_dump() == {
        "score": "auto",
        "batch": "auto",
        "checkpointing": False,
        "cache": "auto",
        "positions": 16,
        "seed": 0,
        "risk": 0.0,
        "also": (),
        "interactions": "auto",
        "curvature": {
            "sequences": 4,
            "length": 64,
            "shards": 4,
            "relative_error": 0.1,
            "max_probes": 4,
            "max_products": 32,
        },
    }
    assert recipe.export == ("compressed-tensors", "bits")
    assert recipe.validation.baselines == ("uniform", "ends", "weight-error", "hawq-v2")
    assert recipe.stability.draws == 32
    assert recipe.model.trust_remote_code is False
    assert recipe.counted_target() == "compressed-tensors"


@pytest.mark.parametrize(
    ("override", "start", "words"),
    [
        (
            "modle.source=x",
            "modle (--set): unknown key; known here: model,",
            "Did you mean 'model'?",
        ),
        (
            "average_bits=4",
            "average_bits (--set): unknown key",
            "Did you mean 'budget.average_bits'?",
        ),
        ("sensitivity.scor=token", "sensitivity.scor (--set): unknown key", "'score'?"),
        ("sensitivity.score=tokn", "sensitivity.score (--set): unknown score 'tokn'", "'token'?"),
        ("runtime=vlm", "runtime (--set): unknown runtime 'vlm'", "Did you mean 'vllm'?"),
        ("export=[bits, gguff]", "export[1] (--set): unknown target 'gguff'", "known: compressed-"),
        ("formats=[int4-g46]", "formats[0] (--set): unknown format 'int4-g46'", "'int4-g64'?"),
        (
            "formats=[int7-g64]",
            "formats[0] (--set): unknown format",
            "no integer format with 7 bits",
        ),
        ("formats=[]", "formats (--set): an empty list is not allowed", "at least one entry"),
        ("formats=int4-g64", "formats (--set): 'int4-g64' (text) is not allowed", "a list."),
        ("formats=[int4-g64, int4-g64]", "formats (--set): int4-g64 stands more than once", "once"),
        ("rounding=search", "rounding (--set): 'search' (text)", "Did you mean 'searched'?"),
        ("model.dtype=float8", "model.dtype (--set): 'float8' (text)", "auto, float32, bfloat16"),
        ("model.revision=12", "model.revision (--set): 12 (a number)", "Write it in quotes."),
        ("model.device=GPU 0", "model.device (--set): 'GPU 0' is not a device", "cuda:0"),
        ("model.task=masked-lm", "model.task (--set): 'masked-lm'", "allowed: causal-lm"),
        ("model=x", "model (--set): 'x' (text) is not allowed here", "a mapping"),
        ("model.source=", "model.source (--set): an empty value is not allowed", "text"),
        ("calibration.sequences='8'", "calibration.sequences (--set): '8'", "without quotes"),
        ("calibration.sequences=8.5", "calibration.sequences (--set): 8.5", "a whole number"),
        (
            "calibration.sequences=true",
            "calibration.sequences (--set): true (true or false)",
            "whole",
        ),
        ("calibration.sequences=1", "calibration.sequences (--set): 1 (a number)", "at least 2"),
        ("calibration.withheld=-1", "calibration.withheld (--set): -1", "at least 0"),
        ("held_out.withheld=3", "held_out.withheld (--set): unknown key", "sequences"),
        ("sensitivity.batch=0", "sensitivity.batch (--set): 0", "allowed: auto or a number of at"),
        ("sensitivity.batch=some", "sensitivity.batch (--set): 'some'", "auto or a whole number"),
        ("sensitivity.risk=-1", "sensitivity.risk (--set): -1", "at least 0"),
        ("sensitivity.risk=.nan", "sensitivity.risk (--set): nan", "a finite number"),
        ("sensitivity.checkpointing=1", "sensitivity.checkpointing (--set): 1", "true or false"),
        (
            "sensitivity.positions=0",
            "sensitivity.positions (--set): the score token",
            "at least 1",
        ),
        ("layers.include=[]", "layers.include (--set): an empty list", "at least one entry"),
        ("layers.misfits=skipp", "layers.misfits (--set): 'skipp'", "Did you mean 'skip'?"),
        ("validate.baselines=[unifrm]", "validate.baselines[0] (--set): 'unifrm'", "'uniform'?"),
        ("stability.draws=-1", "stability.draws (--set): -1", "at least 0"),
        ("other_texts.held-out={}", "other_texts.held-out", "cannot name a text"),
        ("other_texts.a={sorce: x}", "other_texts.a.sorce (--set): unknown key", "'source'?"),
        (
            "other_texts.a={split: calibration}",
            "other_texts.a.split (--set): ",
            "text of calibration",
        ),
        (
            "calibration.split=train",
            "calibration.split (--set): the built-in text has no",
            "held-out",
        ),
        (
            "calibration.column=text",
            "calibration.column (--set): the built-in text",
            "another source",
        ),
        (
            "calibration.config=en",
            "calibration.config (--set): the built-in text",
            "another source",
        ),
        ("calibration.answers_only=true", "calibration.answers_only (--set): ", "conversations"),
        ("held_out.split=calibration", "held_out.split (--set): 'calibration'", "never saw"),
        (
            "size_target=bits",
            "size_target (--set): unknown target of which a size is known",
            "bits",
        ),
        (
            "size_target=compressed-tensors",
            "size_target (--set): says whose bytes",
            "leave this out",
        ),
        ("budget={}", "budget (--set): names no limit", "average_bits, bits_per_weight, size"),
        ("budget.average_bits=0", "budget.average_bits (--set): 0 (a number)", "above 0"),
        ("budget.average_bits=.inf", "budget.average_bits (--set): inf", "finite"),
        ("budget.average_bits=four", "budget.average_bits (--set): 'four'", "a number"),
        (
            "budget.average_bits=3.9",
            "budget.average_bits (--set): 3.9 cannot be had",
            "at least 4 in",
        ),
        (
            "budget.bits_per_weight=4.2",
            "budget.bits_per_weight (--set): 4.2 cannot",
            "at least 4.25",
        ),
        ("budget.size=80mb", "budget.size (--set): '80mb' has the unknown unit", "'80MB'?"),
        ("budget.size=0", "budget.size (--set): 0 (a number)", "above 0"),
        ("budget.size=1.5", "budget.size (--set): 1.5 is not a size", "whole bytes"),
        ("budget.max_kl=1", "budget.max_kl (--set): unknown key", "known here: average_bits"),
    ],
)
def test_each_mistake_names_path_value_reason_and_what_is_allowed(
    tmp_path: Path, override: str, start: str, words: str
) -> None:
    (problem,) = problems(tmp_path, SOUND, override)
    assert problem.startswith(start)
    assert words in problem


def test_every_problem_is_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
model: {sorce: somewhere}
calibration:
  sequences: many
  column: text
formats: [int4-g64, int4-g46]
sensitivity: {score: tokn}
budget:
  average_bits: -4
  average_bits: 5
"""
    found = problems(tmp_path, text, "runtime=vlm")
    paths = [problem.partition(":")[0] for problem in found]
    assert paths == [
        "budget.average_bits (line 8)",  # the key that stands twice
        "runtime (--set)",
        "model.source (line 1)",
        "model.sorce (line 1)",
        "calibration.sequences (line 3)",
        "calibration.column (line 4)",
        "formats[1] (line 5)",
        "sensitivity.score (line 6)",
        "budget.average_bits (line 8)",
    ]


def test_missing_sections_are_named_with_an_example(tmp_path: Path) -> None:
    found = problems(tmp_path, "rounding: nearest\n")
    assert len(found) == 3
    for name, example in (
        ("model", "source:"),
        ("formats", "formats: ["),
        ("budget", "average_bits: 4.0"),
    ):
        (problem,) = [p for p in found if p.startswith(f"{name}:")]
        assert example in problem


def test_limits_that_hold_together_are_no_contradiction(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, SOUND), ["budget.bits_per_weight=4.3", "budget.size=80MB", "size_target="]
    )
    assert recipe.budget.limits() == {
        "average_bits": 4.5,
        "bits_per_weight": 4.3,
        "size": 80_000_000,
    }


def test_a_limit_that_no_format_can_keep_names_the_smallest_format(tmp_path: Path) -> None:
    both = [
        "budget.average_bits=3",
        "budget.bits_per_weight=4.1",
        "formats=[int8-g64, int4-g32-asym]",
    ]
    assert [("int4-g32-asym" in p) for p in problems(tmp_path, SOUND, *both)] == [True, True]
    # 4 bits, a scale of 16 and a zero point of 4 for each 32 columns
    recipe = load_recipe(
        write(tmp_path, SOUND), ["formats=[int4-g32-asym]", "budget.bits_per_weight=4.625"]
    )
    assert recipe.formats == ("int4-g32-asym",)


def test_a_recipe_made_in_python_is_checked_too(tmp_path: Path) -> None:
    made = {"model": {"source": "x"}, "formats": ["int4-g64"], "budget": {"average_bits": 3.0}}
    with pytest.raises(ValidationError, match="cannot be had"):
        Recipe.model_validate(made)


def test_values_never_change(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SOUND))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.runtime = "vllm"  # type: ignore[misc]


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    changes = [
        "budget.size=0.5GiB",
        "model.revision='1e3'",
        "sensitivity.risk=1e-5",
        "other_texts.news={source: news.txt, length: 99}",
        "sensitivity.batch=3",
    ]
    recipe = load_recipe(write(tmp_path, SOUND), changes)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.resolved_yaml())
    again = load_recipe(resolved)
    assert again == recipe
    assert again.budget.size == 2**29
    assert again.model.revision == "1e3"
    assert again.resolved_yaml() == recipe.resolved_yaml()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (123, 123),
        ("80MB", 80_000_000),
        ("80 MB", 80_000_000),
        ("0.5GiB", 2**29),
        ("1.5kB", 1500),
        ("1KB", 1000),
        ("3KiB", 3072),
        ("7B", 7),
        ("0.0019kB", 1),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_exact_bytes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "80", "-3MB", "80Mb", "80 M B", True, None, [1]])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="whole bytes"):
        parse_bytes(text)  # type: ignore[arg-type]


def test_budgets_of_a_command_line() -> None:
    assert load_budget(["average_bits=4.5", "size=80MB"]).limits() == {
        "average_bits": 4.5,
        "size": 80_000_000,
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["avrage_bits=4"], "Did you mean 'average_bits'?"),
        (["average_bits=-1"], "above 0"),
        (["average_bits"], "PATH=VALUE"),
        (["average_bits=4", "average_bits=5"], "contradict"),
        (["average_bits="], "names no limit"),
    ],
)
def test_budgets_that_are_wrong_are_refused(given: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match="--budget") as caught:
        load_budget(given)
    assert words in str(caught.value)
