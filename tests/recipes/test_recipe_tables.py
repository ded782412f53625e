"""The table of presets: what each does, when to take it, and the paper."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import Cli

from rk_export.options.kinds import step_kinds
from rk_export.recipes import DEFAULT, preset_names, presets
from rk_export.recipes.tables import presets_table

FOLDER = Path(__file__).parents[2] / "rk_export" / "recipes" / "presets"


def test_every_file_is_a_preset_and_the_default_comes_first() -> None:
    assert set(preset_names()) == {path.stem for path in FOLDER.iterdir()}
    assert {path.suffix for path in FOLDER.iterdir()} == {".yaml"}
    assert preset_names()[0] == DEFAULT
    assert list(preset_names()[1:]) == sorted(preset_names()[1:])
    assert list(presets()) == list(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_what_it_is_for(name: str) -> None:
    about = presets()[name].about
    for text in (about.does, about.when):
        assert text[0].isupper()
        assert text.endswith(".")
        assert all(len(sentence.split()) <= 24 for sentence in text.split(". "))
    assert about.paper is None or re.fullmatch(r"\d{4}\.\d{5}", about.paper)


def test_every_step_that_decides_has_a_preset() -> None:
    used = {
        name
        for preset in presets().values()
        for step in yaml.safe_load(preset.text)["steps"]
        for name in step
    }
    assert {kind.name for kind in step_kinds() if kind.stage == "decide"} <= used


def test_the_table_has_a_row_for_each_preset() -> None:
    table = presets_table({name: preset.about for name, preset in presets().items()})
    assert [column.title for column in table.columns] == [
        "recipe",
        "what it does",
        "when to take it",
        "arXiv",
    ]
    assert [row[0] for row in table.rows] == list(preset_names())
    assert dict(zip(preset_names(), (row[3] for row in table.rows), strict=True))["cap"] == "2505.03801"


def test_the_command_prints_the_table_a_file_the_fields_and_the_schema(cli: Cli) -> None:
    table = cli("recipes")
    assert table.code == 0
    assert all(name in table.out for name in preset_names())
    assert json.loads(cli("recipes", "--json").out)["cap"]["paper"] == "2505.03801"
    assert cli("recipes", "cap").out == presets()["cap"].text
    assert "learning_rate" in cli("recipes", "--steps").out
    assert json.loads(cli("recipes", "--schema").out)["title"] == "rk-export recipe"


@pytest.mark.parametrize(
    ("words", "hint"),
    [(("capp",), "did you mean cap?"), (("cap", "--schema"), "give one"), (("--steps", "--schema"), "")],
)
def test_the_command_refuses_what_it_cannot_print(cli: Cli, words: tuple[str, ...], hint: str) -> None:
    ended = cli("recipes", *words)
    assert ended.code == 2
    assert hint in ended.err
