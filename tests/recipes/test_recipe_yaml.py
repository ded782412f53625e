"""What a recipe file may look like: numbers, empty files, and texts that are no YAML of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from rk_export.errors import InputError
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.heal.options import HealOptions
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import Budget
from rk_export.options.recipe import Recipe
from rk_export.recipes import load
from rk_export.recipes.places import parsed


def loaded(folder: Path, text: str | bytes) -> Recipe:
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-2", 0.01), ("1E-2", 0.01), ("0.01", 0.01), (".01", 0.01), ("+1.0e-2", 0.01), ("1.e-2", 0.01)),
        *(("2", 2), ("-7", -7), ("+7", 7), ("0", 0), ("5.0", 5.0), ("09", 9.0)),
        *((".inf", float("inf")), ("-.inf", float("-inf"))),
        *(
            ("1:30", "1:30"),
            ("0o17", "0o17"),
            ("0x1F", "0x1F"),
            ("1_000", "1_000"),
            ("2020-01-01", "2020-01-01"),
        ),
        *(('"1e-2"', "1e-2"), ("true", True), ("null", None), ("~", None), ("", None), ("[1, a]", [1, "a"])),
    ],
)
def test_scalars(text: str, value: object) -> None:
    data, _ = parsed(f"key: {text}", "file")
    assert data["key"] == value
    assert type(data["key"]) is type(value)


@pytest.mark.parametrize("text", ["1e-2", "0.01", "1.0E-2", "+.01"])
def test_numbers_reach_the_field(tmp_path: Path, text: str) -> None:
    recipe = loaded(tmp_path, f"steps:\n  - heal: {{steps: 5, learning_rate: {text}}}\n")
    assert recipe.steps == (HealOptions(5, learning_rate=0.01),)


def test_a_whole_number_is_a_float_where_one_is_wanted(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, "steps:\n  - heal: {steps: 5, temperature: 2}\n")
    assert recipe.steps == (HealOptions(5, temperature=2.0),)


@pytest.mark.parametrize(
    ("size", "number"), [("90MB", 90e6), ("1.2GB", 1.2e9), ("90000000", 90e6), ("9e7", 90e6)]
)
def test_sizes(tmp_path: Path, size: str, number: float) -> None:
    assert loaded(tmp_path, f"budget: {{size: {size}}}\nsteps: [factorize: {{}}]\n").budget == Budget(
        "size", number
    )
    assert loaded(tmp_path, f"steps:\n  - cap: {{size: {size}}}\n").steps == (CapOptions(size=number),)


@pytest.mark.parametrize(
    "text", ["", "\n", "# nothing\n", "---\n", "{}\n", "steps: []\n", "\ufeffsteps: []\n"]
)
def test_a_file_that_says_nothing_leaves_the_model_alone(tmp_path: Path, text: str) -> None:
    assert loaded(tmp_path, text) == Recipe()


def test_lists_stand_in_either_style(tmp_path: Path) -> None:
    flow = loaded(tmp_path, "steps: [cap: {keep: 0.5}, heal: {steps: 5, what: norms}]\n")
    block = loaded(tmp_path, "steps:\n- cap:\n    keep: 0.5\n- heal:\n    steps: 5\n    what:\n    - norms\n")
    assert flow == block == Recipe((CapOptions(keep=0.5), HealOptions(5, what=("norms",))))


def test_a_text_beside_the_file_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.txt").write_text("some text", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    text = loaded(tmp_path / "recipes", "calibration: {text: own.txt}\n").calibration.text
    assert text != CalibrationOptions().text
    assert (
        text
        == loaded(tmp_path, f"calibration: {{text: {tmp_path / 'recipes' / 'own.txt'}}}").calibration.text
    )


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("calibration: {text: none}\ncalibration: {text: self}\n", "2:1", "'calibration' stands twice"),
        ("steps:\n  - cap: {keep: 0.5, keep: 0.4}\n", "2:22", "'keep' stands twice"),
        ("calibration: &one {text: none}\ntarget: *one\n", "1:14", "an alias"),
        ("steps:\n\t- cap: {keep: 0.5}\n", "2:1", "cannot start any token"),
        ("steps: [\n", "2:1", "no YAML"),
        ("steps: {a: b\n", "2:1", "no YAML"),
        ("steps: []\n---\nsteps: []\n", "2:1", "another document"),
        ("? [a]\n: 2\n", "1:3", "a key that is no name"),
        ("calibration: {text: !!binary aGk=}\n", "1:21", "neither text nor a number"),
        ("calibration: {text: !!timestamp 2020-01-01}\n", "1:21", "neither text nor a number"),
        ("calibration: {seed: !!int abc}\n", "1:21", "neither text nor a number"),
        ('calibration: {text: "\\ud800"}\n', "1:21", "neither text nor a number"),
        (f"calibration: {{seed: {'1' * 5000}}}\n", "1:21", "neither text nor a number"),
        ("calibration: {text: !!python/name:os.system }\n", "1:21", "could not determine a constructor"),
        ("target:\n  ep: \x00\n", "2:7", "the character U+0000"),
        ("hello\n", "1:1", "no recipe"),
        ("- cap: {keep: 0.5}\n", "1:1", "no recipe"),
        ("5\n", "1:1", "no recipe"),
    ],
)
def test_no_yaml_of_ours(tmp_path: Path, text: str, where: str, what: str) -> None:
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, text)
    assert caught.value.where == f"{tmp_path / 'mine.yaml'}:{where}"
    assert what in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000 + "a"])
def test_deep_nesting_is_a_message(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="nested too deeply"):
        loaded(tmp_path, text)


@pytest.mark.parametrize("text", [b"steps: \xff\n", "steps: []".encode("utf-16"), b"\x89PNG\r\n"])
def test_a_file_in_another_encoding_is_a_message(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, text)
    assert caught.value.where == str(tmp_path / "mine.yaml")
    assert "UTF-8" in str(caught.value)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too large for a recipe"):
        loaded(tmp_path, "#" * 1_000_001)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("int44", "did you mean int4?"), ("joint_rank", "did you mean joint-rank?"), ("x" * 5000, "")],
)
def test_neither_a_preset_nor_a_file(name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        load(name)
    assert caught.value.what == "neither a preset nor a file"
    assert caught.value.where == name
    assert hint in str(caught.value.fix)
    assert "`rk-export recipes`" in str(caught.value.fix)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a preset nor a file"):
        load(tmp_path)
