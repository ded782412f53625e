"""Every field of a recipe is explained, and the JSON schema says what `load` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from random_recipes import recipes

from rk_export.options.calibration import CalibrationOptions
from rk_export.options.kinds import step_kinds
from rk_export.options.ranks import BUDGET_KINDS
from rk_export.options.recipe import Recipe
from rk_export.options.step import Step, key_of
from rk_export.options.target import Target
from rk_export.recipes import preset_names, presets, recipe_text
from rk_export.recipes.fields import documented, json_schema, section_help
from rk_export.recipes.tables import fields_tables

SECTIONS = {kind.name: kind for kind in step_kinds()} | {"calibration": CalibrationOptions, "target": Target}


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    Draft202012Validator.check_schema(json_schema())
    return Draft202012Validator(json_schema())


def misspelled(data: Any) -> Iterator[Any]:
    """Yield copies of data, each with one key misspelled."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield {(f"{name}x" if name == key else name): item for name, item in data.items()}
            for other in misspelled(value):
                yield {**data, key: other}
    if isinstance(data, list):
        for index, value in enumerate(data):
            for other in misspelled(value):
                yield [*data[:index], other, *data[index + 1 :]]


@pytest.mark.parametrize("name", preset_names())
def test_the_schema_takes_every_preset_and_no_misspelling(schema: Draft202012Validator, name: str) -> None:
    data = yaml.safe_load(presets()[name].text)
    for step in data["steps"]:
        if "basel" in step:
            assert not schema.is_valid(data)  # it needs the text of a task
            step["basel"]["target"] = "task.txt"
    schema.validate(data)
    wrong = list(misspelled(data))
    assert len(wrong) > 4
    assert [one for one in wrong if schema.is_valid(one)] == []


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=recipes())
def test_the_schema_takes_whatever_is_written(schema: Draft202012Validator, recipe: Recipe) -> None:
    schema.validate(yaml.safe_load(recipe_text(recipe)))


@pytest.mark.parametrize(
    "text",
    [
        "steps: [prepare: [fold]]",
        "steps: [prepare: auto]",
        "steps: [prepare: {names: auto}]",
        "steps: [quantize: {targets: layers, ignore: q}]",
        "steps: [quantize: {targets: [layers], with: rtn}]",
        "budget: {size: 90MB}",
        "budget: {size: int4}",
        "budget: {speed_up: 1.5, phase: prefill}",
        "calibration: {text: own.txt}",
        "calibration: {text: {name: own.txt, sha256: abc}}",
        "steps: [basel: {target: own.txt, keep: 0.5}]",
        "steps: [cap: {size: 90MB}]",
        "about: {does: x, when: y}",
        "{}",
    ],
)
def test_the_schema_takes_every_way_to_write_a_value(schema: Draft202012Validator, text: str) -> None:
    schema.validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "steps: {prepare: auto}",
        "steps: [heal: {steps: many}]",
        "steps: [heal: {}]",
        "steps: [quantize: {quantizer: rtn}]",
        "steps: [quantize: {symmetric: 1}]",
        "steps: [cap]",
        "budget: {phase: sometimes}",
        "target: {ep: gpu}",
        "[]",
    ],
)
def test_the_schema_refuses_what_has_another_type(schema: Draft202012Validator, text: str) -> None:
    assert not schema.is_valid(yaml.safe_load(text))


def test_the_schema_explains_every_field() -> None:
    found = json_schema()
    assert found["title"] == "rk-export recipe"
    for kind in (*step_kinds(), CalibrationOptions, Target):
        definition = found["$defs"][kind.__name__]
        assert definition["description"] == documented(kind)[0]
        assert set(definition["properties"]) == {key_of(item) for item in fields(kind)}
        assert all(item["description"].endswith(".") for item in definition["properties"].values())


def test_every_section_and_field_is_explained() -> None:
    sections = {section.name: section for section in section_help()}
    assert set(sections) == {*SECTIONS, "budget"}
    for name, section in sections.items():
        assert section.help.endswith("."), name
        for field in section.fields:
            assert len(field.help) > 10, f"{name}.{field.name}"
            assert field.help.endswith("."), f"{name}.{field.name}"
            assert field.default, f"{name}.{field.name}"
    assert [field.name for field in sections["budget"].fields] == [*BUDGET_KINDS, "phase"]


@pytest.mark.parametrize("name", SECTIONS)
def test_docstrings_name_the_fields_and_nothing_else(name: str) -> None:
    kind: type[Any] = SECTIONS[name]
    assert list(documented(kind)[1]) == [item.name for item in fields(kind)]


def test_defaults_are_as_a_file_says_them() -> None:
    shown = {
        f"{section.name}.{field.name}": field.default
        for section in section_help()
        for field in section.fields
    }
    assert shown["heal.steps"] == shown["correct.rank"] == shown["basel.target"] == "required"
    assert shown["quantize.targets"] == "[layers]"
    assert shown["quantize.with"] == shown["factorize.keep"] == "null"
    assert shown["quantize.symmetric"] == "true"
    assert shown["prepare.names"] == "auto"
    assert shown["calibration.text"] == "self"


def test_steps_stand_in_the_order_in_which_they_may_follow() -> None:
    names = [section.name for section in section_help()]
    assert names[: len(step_kinds())] == [kind.name for kind in step_kinds()]
    assert names.index("prune") < names.index("factorize") < names.index("quantize") < names.index("heal")
    assert all(issubclass(kind, Step) for kind in step_kinds())


def test_there_is_a_table_for_each_section() -> None:
    tables = fields_tables(section_help())
    for section, table in zip(section_help(), tables, strict=True):
        assert table.title == f"{section.name}: {section.help}"
        assert [row[0] for row in table.rows] == [field.name for field in section.fields]
