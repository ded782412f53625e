"""What may stand in a recipe, from the classes themselves: for tables, the documentation and editors."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from rk_export.json_codec import to_json
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.kinds import step_kinds
from rk_export.options.ranks import BUDGET_MEANINGS, Budget
from rk_export.options.recipe import Recipe
from rk_export.options.step import key_of
from rk_export.options.target import Target
from rk_export.options.texts import TextFile
from rk_export.recipes.presets import About


@dataclass(frozen=True)
class FieldHelp:
    """One field of a step.

    Args:
        name: As files have it.
        default: As a file would say it; "required" where the field has none.
        help: What it means.
    """

    name: str
    default: str
    help: str


@dataclass(frozen=True)
class SectionHelp:
    """A step, or another section of a recipe.

    Args:
        name: As files have it.
        help: What it does.
        fields: Its fields.
    """

    name: str
    help: str
    fields: tuple[FieldHelp, ...]


def section_help() -> tuple[SectionHelp, ...]:
    """Return every step and every other section of a recipe, with the meaning of each field."""
    steps = [_section(kind.name, kind) for kind in step_kinds()]
    others = [_section("calibration", CalibrationOptions), _budget(), _section("target", Target)]
    return (*steps, *others)


def _section(name: str, kind: type) -> SectionHelp:
    summary, said = documented(kind)
    return SectionHelp(
        name,
        summary,
        tuple(FieldHelp(key_of(item), _default(item), said[item.name]) for item in fields(kind)),
    )


def _budget() -> SectionHelp:
    summary, said = documented(Budget)
    amounts = (FieldHelp(kind, "null", meaning) for kind, meaning in BUDGET_MEANINGS.items())
    return SectionHelp("budget", summary, (*amounts, FieldHelp("phase", Budget.phase, said["phase"])))


def _default(item: Field[Any]) -> str:
    """Return a field's default as a file would say it."""
    if item.default is MISSING:
        return "required"
    return json.dumps(to_json(item.default)).replace('"', "")


def documented(kind: type) -> tuple[str, dict[str, str]]:
    """Return the text of a class's docstring above its arguments, and what it says of each argument."""
    text = inspect.cleandoc(kind.__doc__ or "")
    head, _, arguments = text.partition("\nArgs:\n")
    said = {}
    for block in re.split(r"\n(?= {4}\w)", f"\n{arguments.rstrip()}"):
        name, colon, meaning = block.strip().partition(": ")
        if colon:
            said[name] = " ".join(meaning.split())
    return " ".join(head.split()), said


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipe files, for editors."""
    from pydantic import TypeAdapter

    schema: dict[str, Any] = TypeAdapter(Recipe).json_schema()
    schema["title"] = "rk-export recipe"
    schema["description"] = documented(Recipe)[0]
    kinds = {kind.__name__: kind for kind in (*step_kinds(), CalibrationOptions, Target, TextFile)}
    for name, definition in schema["$defs"].items():
        if (kind := kinds.get(name)) is not None:
            _as_in_files(definition, kind)
    steps = schema["properties"]["steps"]["items"]["properties"]
    for kind in step_kinds():
        if kind.bare is not None:
            steps[kind.name] = {"anyOf": [_shape_of(schema, kind, kind.bare), steps[kind.name]]}
    schema["properties"]["about"] = {
        "type": "object",
        "description": "What the recipe is for.",
        "properties": {item.name: {"type": "string"} for item in fields(About)},
        "additionalProperties": False,
    }
    schema["additionalProperties"] = False
    return schema


def _as_in_files(definition: dict[str, Any], kind: type) -> None:
    """Give a definition the names and descriptions that files have, and one name without brackets for a list."""
    summary, said = documented(kind)
    definition["description"] = summary
    definition["additionalProperties"] = False
    properties = {}
    for item in fields(kind):
        if not item.metadata.get("saved", True):
            continue
        one = definition["properties"][item.name]
        if item.metadata.get("listed"):
            one = {"anyOf": [{"type": "string"}, one]}
        properties[key_of(item)] = {**one, "description": said[item.name]}
    definition["properties"] = properties


def _shape_of(schema: dict[str, Any], kind: type, field: str) -> dict[str, Any]:
    shape: dict[str, Any] = schema["$defs"][kind.__name__]["properties"][field]
    return shape
