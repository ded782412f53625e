"""Schemas of tools in one schema: it takes the calls that the tools' own schemas take, by `jsonschema`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import runtime_models

from rk_export.runtime.server.json_schema import GrammarTokens
from rk_export.runtime.server.openai_types import FunctionDefinition, Tool
from rk_export.runtime.server.tool_schema import call_schema

PLACE = {"type": "object", "properties": {"at": {"enum": ["north"]}}, "required": ["at"]}
# What pydantic makes of nested models, two generations of it, and a schema that holds itself.
DEFS = {
    "type": "object",
    "properties": {"p": {"$ref": "#/$defs/P"}},
    "required": ["p"],
    "$defs": {"P": PLACE},
}
OLD = {"properties": {"p": {"$ref": "#/definitions/P"}}, "required": ["p"], "definitions": {"P": PLACE}}
OWN = {**PLACE, "properties": {**PLACE["properties"], "next": {"$ref": "#"}}}  # type: ignore[dict-item]
NAMED = {
    "$id": "http://example.org/tool",
    "type": "object",
    "properties": {"default": {"$ref": "#/$defs/P"}, "$ref": {"const": {"$ref": "#/x"}}},
    "required": ["default"],
    "$defs": {"P": PLACE},
}
NORTH, SOUTH = {"at": "north"}, {"at": "south"}


def tools(*parameters: dict[str, Any]) -> list[Tool]:
    functions = [FunctionDefinition(name=f"f{n}", parameters=one) for n, one in enumerate(parameters)]
    return [Tool(type="function", function=function) for function in functions]


@pytest.mark.parametrize(
    ("parameters", "fits", "misfits"),
    [
        (DEFS, {"p": NORTH}, {"p": SOUTH}),
        (OLD, {"p": NORTH}, {"p": SOUTH}),
        (OWN, {**NORTH, "next": {**NORTH, "next": NORTH}}, {**NORTH, "next": {**NORTH, "next": SOUTH}}),
        (NAMED, {"default": NORTH, "$ref": {"$ref": "#/x"}}, {"default": SOUTH}),
    ],
    ids=["$defs", "definitions", "itself", "names"],
)
def test_references_lead_where_they_led(
    tmp_path: Path, parameters: dict[str, Any], fits: dict[str, Any], misfits: dict[str, Any]
) -> None:
    other = {"type": "object", "$defs": {"P": {"const": 1}}, "properties": {"p": {"$ref": "#/$defs/P"}}}
    schema = call_schema(tools(other, parameters))
    checker = jsonschema.Draft202012Validator(schema)
    assert checker.is_valid({"name": "f1", "arguments": fits})
    assert checker.is_valid({"name": "f0", "arguments": {"p": 1}})
    assert not checker.is_valid({"name": "f1", "arguments": misfits})
    assert not checker.is_valid({"name": "f2", "arguments": fits})
    runtime_models.TinyDecoder().write(tmp_path / "tiny")
    constraint = GrammarTokens(tmp_path / "tiny", None, [257]).constraint(schema, "tools")
    for byte in b'{"name":"f1"':
        assert constraint.mask(np.zeros(258, np.float32))[byte] == 0
        constraint.accept(byte)
