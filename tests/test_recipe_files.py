"""A local file has no splits, so it cannot be calibration and held-out text at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqkit.errors import RecipeError
from hawqkit.recipe import load_recipe


def test_one_file_cannot_calibrate_and_validate(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {source: m}\ncalibration: {source: a.txt}\nheld_out: {source: a.txt}\n"
        "formats: [int4-g64]\nbudget: {average_bits: 4.0}\n"
    )
    with pytest.raises(RecipeError, match="is the text of calibration too"):
        load_recipe(recipe, [])
