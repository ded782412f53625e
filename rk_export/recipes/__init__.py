"""Recipes as files: presets, reading with line and column, single fields set, writing, and what each field means."""

from __future__ import annotations

from rk_export.recipes.load import load
from rk_export.recipes.presets import DEFAULT, Preset, preset_names, presets
from rk_export.recipes.write import RECIPE, recipe_text, save_recipe

__all__ = ["DEFAULT", "RECIPE", "Preset", "load", "preset_names", "presets", "recipe_text", "save_recipe"]
