"""Recipes: what a run is told, checked before anything is loaded. Nothing here imports torch."""

from __future__ import annotations

from hawqkit.recipe.loading import load_budget, load_recipe
from hawqkit.recipe.schema import (
    BudgetSection,
    CalibrationSection,
    HeldOutSection,
    LayersSection,
    ModelSection,
    Recipe,
    SensitivitySection,
    SpectrumSection,
    StabilitySection,
    TextSection,
    ValidateSection,
    recipe_schema,
    schema_text,
)
from hawqkit.recipe.shipped import Shipped, find_recipe, shipped_recipes
from hawqkit.recipe.values import parse_bytes

__all__ = [
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
    "ValidateSection",
    "find_recipe",
    "load_budget",
    "load_recipe",
    "parse_bytes",
    "recipe_schema",
    "schema_text",
    "shipped_recipes",
]
