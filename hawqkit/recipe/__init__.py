"""Recipes: what a run is told, checked before anything is loaded. Nothing here imports torch."""

from __future__ import annotations

from hawqkit.recipe.data_sections import (
    CLASSIFIERS,
    CalibrationSection,
    HeldOutSection,
    ModelSection,
    TextSection,
)
from hawqkit.recipe.loading import load_budget, load_recipe
from hawqkit.recipe.schema import (
    BudgetSection,
    LayersSection,
    Recipe,
    SensitivitySection,
    SpectrumSection,
    StabilitySection,
    ValidateSection,
    recipe_schema,
    schema_text,
)
from hawqkit.recipe.shipped import Shipped, find_recipe, shipped_recipes
from hawqkit.recipe.tuning_section import TuneSection
from hawqkit.recipe.values import parse_bytes, parse_milliseconds

__all__ = [
    "CLASSIFIERS",
    "BudgetSection",
    "CalibrationSection",
    "HeldOutSection",
    "LayersSection",
    "ModelSection",
    "Recipe",
    "SensitivitySection",
    "Shipped",
    "SpectrumSection",
    "StabilitySection",
    "TextSection",
    "TuneSection",
    "ValidateSection",
    "find_recipe",
    "load_budget",
    "load_recipe",
    "parse_bytes",
    "parse_milliseconds",
    "recipe_schema",
    "schema_text",
    "shipped_recipes",
]
