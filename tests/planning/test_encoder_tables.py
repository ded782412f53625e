"""The format of an encoder's token table, where a recipe speaks of the output projection too."""

from __future__ import annotations

import pytest

from rk_export.options.quantize import Quantize
from rk_export.options.ranks import Budget
from rk_export.options.recipe import Recipe
from rk_export.planning.encoder_tables import with_encoder_table

TABLES = ("embed_tokens", "lm_head")


@pytest.mark.parametrize(("preset", "bits"), [("int4", 4), ("int2", 4), ("int8", 8), ("w8a8", 8)])
def test_presets(preset: str, bits: int) -> None:
    recipe, notices = with_encoder_table(Recipe.load(preset))
    assert recipe.table_quant is not None
    assert recipe.table_quant.bits == bits
    assert bool(notices) == (recipe != Recipe.load(preset))
    assert all("name embed_tokens alone" in notice for notice in notices)


def test_a_step_of_the_table_alone_is_followed() -> None:
    recipe = Recipe((Quantize(bits=4), Quantize(targets=("embed_tokens",), bits=8)))
    assert with_encoder_table(recipe) == (recipe, ())


def test_a_budget_keeps_the_table_open() -> None:
    recipe = Recipe((Quantize(targets=("all",), bits="auto"),), budget=Budget("size", 1e6))
    assert with_encoder_table(recipe) == (recipe, ())
    without, _ = with_encoder_table(Recipe((Quantize(targets=("all",), bits="auto"),)))
    assert without.table_quant is not None
    assert without.table_quant.bits == 4


def test_floats_stay() -> None:
    recipe = Recipe((Quantize(targets=TABLES, bits=8),))
    assert with_encoder_table(recipe) == (recipe, ())
