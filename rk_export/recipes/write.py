"""A recipe as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rk_export.json_codec import to_json
from rk_export.options.recipe import Recipe
from rk_export.recipes.places import FLOAT, FLOAT_PATTERN, FLOAT_STARTS

# Name of the file in a bundle.
RECIPE = "recipe.yaml"
# YAML takes them for line breaks, so they have to be written as escapes.
_BREAKS = {"\x85", "\u2028", "\u2029"}


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `load` would read as numbers: 1e3."""


_Dumper.add_implicit_resolver(FLOAT, FLOAT_PATTERN, FLOAT_STARTS)


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as YAML with every field that has a value; `load` reads it."""
    data = _without_nothing(to_json(recipe))
    text = _dumped(data, allow_unicode=True)
    return _dumped(data, allow_unicode=False) if _BREAKS & set(text) else text


def _dumped(data: Any, *, allow_unicode: bool) -> str:
    text: str = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=allow_unicode
    )
    return text


def save_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe."""
    path.write_text(recipe_text(recipe), encoding="utf-8")


def _without_nothing(value: Any) -> Any:
    """Return JSON data without the fields that are null, which is what they are by default."""
    if isinstance(value, Mapping):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nothing(item) for item in value]
    return value
