"""A recipe that is written says the same when it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from random_recipes import recipes

from rk_export.methods.basel.options import BaselOptions
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.quantize import Quantize
from rk_export.options.ranks import Budget
from rk_export.options.recipe import Recipe
from rk_export.options.texts import TextFile
from rk_export.recipes import load, preset_names, presets, recipe_text, save_recipe

DIGEST = 64 * "0"


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=recipes())
@example(recipe=Recipe((Quantize(("1e3", "5", "null", "yes", "1:30", "~")),)))
@example(recipe=Recipe(calibration=CalibrationOptions(TextFile("1e3", DIGEST))))
@example(recipe=Recipe((BaselOptions(TextFile("a: b\n# 'c'", DIGEST), keep=5e-324),)))
@example(recipe=Recipe((Quantize(("\x85", "\u2028 é\u2029")),)))
@example(recipe=Recipe((Quantize(bits="auto"),), budget=Budget("mean_bits", 1e1)))
def test_any_recipe_is_read_as_it_was_written(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    save_recipe(path, recipe)
    again = load(path)
    assert again == recipe
    assert recipe_text(again) == recipe_text(recipe)


@pytest.mark.parametrize(
    "name", [name for name in preset_names() if "target=FILE" not in presets()[name].text]
)
def test_a_preset_that_was_printed_is_the_preset(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(presets()[name].text, encoding="utf-8")
    assert load(path) == load(name) == Recipe.load(name)
    save_recipe(path, load(name))
    assert load(path) == load(name)


def test_what_is_written_is_short_and_in_order() -> None:
    recipe = load("cap", ["quantize={targets: [q, k], bits: 8}", "heal.steps=5", "calibration.text=none"])
    text = recipe_text(recipe)
    assert [
        key for line in text.splitlines() if not line.startswith((" ", "-")) for key in [line.split(":")[0]]
    ] == [
        *("steps", "calibration", "target"),
    ]
    assert text.index("cap:") < text.index("quantize:") < text.index("heal:")
    assert "null" not in text


def test_a_text_is_written_by_name_and_content_never_by_path(tmp_path: Path) -> None:
    text = tmp_path / "secret-folder" / "own.txt"
    text.parent.mkdir()
    text.write_text("some text", encoding="utf-8")
    recipe = load("basel", [f"basel.target={text}", f"calibration.text={text}"])
    path = tmp_path / "recipe.yaml"
    save_recipe(path, recipe)
    assert "secret-folder" not in path.read_text(encoding="utf-8")
    assert "own.txt" in path.read_text(encoding="utf-8")
    again = load(path)
    assert again == recipe
    assert again.missing_text == TextFile.of(text)
    found = again.with_texts((text,))
    basel = found.find(BaselOptions)
    assert found.missing_text is None
    assert basel is not None
    assert basel.target.path == text


def test_another_text_of_the_same_name_is_not_taken(tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("some text", encoding="utf-8")
    recipe = load("int4", [f"calibration.text={text}"])
    path = tmp_path / "recipe.yaml"
    save_recipe(path, recipe)
    text.write_text("another text", encoding="utf-8")
    assert load(path).with_texts((text,)).missing_text is not None
