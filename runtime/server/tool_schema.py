"""The JSON schema of a call: the schemas of several tools in one, without a reference that leads astray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rk_export.runtime.server.openai_types import Tool

# Below these a key is a name that the schema's author chose, and no word of JSON Schema.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_DATA = ("const", "enum", "default", "example", "examples")


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """Return the JSON schema of one call of one of the tools.

    The parameters of each tool become a definition of their own. A reference in them starts at that definition, for it
    was written against the root of the parameters.
    """
    places = {f"tool{number}": tool for number, tool in enumerate(tools)}
    return {
        "anyOf": [_call_of(tool, f"#/$defs/{place}") for place, tool in places.items()],
        "$defs": {place: _parameters(tool, f"#/$defs/{place}") for place, tool in places.items()},
    }


def _call_of(tool: Tool, parameters: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": parameters}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _parameters(tool: Tool, root: str) -> dict[str, Any]:
    given = tool.function.parameters or {"type": "object"}
    # An identity of their own would change what the references start from.
    return {key: _moved(key, value, root) for key, value in given.items() if key not in ("$id", "$schema")}


def _moved(key: str, value: Any, root: str) -> Any:
    """Return the value of one word of a schema with its references below another root."""
    if key in _DATA:
        return value
    if key == "$ref" and isinstance(value, str):
        return root + value[1:] if value == "#" or value.startswith("#/") else value
    if key in _NAMED and isinstance(value, dict):
        return {name: _schema(item, root) for name, item in value.items()}
    return _schema(value, root)


def _schema(value: Any, root: str) -> Any:
    if isinstance(value, list):
        return [_schema(item, root) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _moved(key, item, root) for key, item in value.items()}
