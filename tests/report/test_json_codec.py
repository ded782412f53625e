"""The JSON of our dataclasses: exact both ways, strict about types, and clear about where something does not fit."""

from __future__ import annotations

import enum
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rk_export.errors import FieldError, InputError
from rk_export.json_codec import Float, from_json, load_json, parse_json, to_json


class Colour(enum.StrEnum):
    """Written by value."""

    RED = "red"


@dataclass(frozen=True)
class Leaf:
    """With a check of its own."""

    size: int
    weight: Float = 0.0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise FieldError(f"{self.size} is below 0", where="--size", fix="give 0 or more")


@dataclass(frozen=True)
class Tree:
    """One field of every kind that is stored."""

    name: str
    leaves: tuple[Leaf, ...]
    pairs: tuple[tuple[int, ...], ...] = ()
    best: Leaf | None = None
    colour: Colour = Colour.RED
    shares: dict[str, Float] | None = None
    details: dict[str, Any] | None = None
    flag: bool = False


TREE = Tree("t", (Leaf(1), Leaf(2, -math.inf)), ((1, 2), ()), Leaf(3), shares={"a": 1}, details={"x": [1]})


def test_what_is_written_comes_back() -> None:
    assert from_json(Tree, json.loads(json.dumps(to_json(TREE), allow_nan=False)), "t.json") == TREE


def test_floats_that_json_does_not_know_are_words() -> None:
    assert to_json((math.inf, -math.inf, math.nan, 1.5)) == ["inf", "-inf", "nan", 1.5]
    assert math.isnan(from_json(Leaf, {"size": 1, "weight": "nan"}, "t.json").weight)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"name": None}, "t.json: name"),
        ({"leaves": {}}, "t.json: leaves"),
        ({"leaves": [{"size": 1}, {}]}, "t.json: leaves[1].size"),
        ({"leaves": [{"size": 1, "colour": "red"}]}, "t.json: leaves[0].colour"),
        ({"leaves": [{"size": 1.0}]}, "t.json: leaves[0].size"),
        ({"leaves": [{"size": True}]}, "t.json: leaves[0].size"),
        ({"leaves": [{"size": 1, "weight": "1.5"}]}, "t.json: leaves[0].weight"),
        ({"leaves": [{"size": 1, "weight": True}]}, "t.json: leaves[0].weight"),
        ({"best": 3}, "t.json: best"),
        ({"colour": "blue"}, "t.json: colour"),
        ({"shares": {"a": "much"}}, "t.json: shares.a"),
        ({"pairs": [[1, "2"]]}, "t.json: pairs[0][1]"),
        ({"flag": 1}, "t.json: flag"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(change: dict[str, Any], place: str) -> None:
    with pytest.raises(InputError) as caught:
        from_json(Tree, {**to_json(TREE), **change}, "t.json", fix="mend it")
    assert (caught.value.where, caught.value.fix) == (place, "mend it")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"leaves": [{"size": 1}, {"size": -1}]}, "t.json: leaves[1]: --size"),
        ({"best": {"size": -1}}, "t.json: best: --size"),
    ],
)
def test_a_value_that_is_refused_keeps_its_reason_and_gets_its_place(
    change: dict[str, Any], place: str
) -> None:
    with pytest.raises(InputError) as caught:
        from_json(Tree, {**to_json(TREE), **change}, "t.json")
    error = caught.value
    assert (error.what, error.where, error.fix) == ("-1 is below 0", place, "give 0 or more")


@pytest.mark.parametrize("data", [3, None, [], "text"])
def test_what_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(InputError, match=r"t\.json: expected an object; found"):
        from_json(Tree, data, "t.json")


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (None, "cannot be read")]
)
def test_a_file_that_is_no_json_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"t\.json: {message}"):
        load_json(path, fix="restore it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 65 + b"]" * 65, "nested deeper than 64 levels"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[" + b"0," * (1 << 22) + b"0]", r"too large for such a file: 4,194,305 values"),
        (b"9" * 5000, "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
    ],
)
def test_a_json_text_is_read_within_bounds(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_json(content, where="t.json", fix="restore it")


def test_what_is_just_within_the_bounds_is_read() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, where="t.json", fix="") is not None
    many = parse_json(b"[" + b"0," * ((1 << 20) - 1) + b"0]", where="t.json", fix="")
    assert len(many) == 1 << 20


def test_a_file_without_an_end_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a pipe or a device"):
        load_json(Path("/dev/zero"), fix="restore it")
    with (tmp_path / "t.json").open("wb") as handle:
        handle.truncate((1 << 27) + 1)
    with pytest.raises(InputError, match="134,217,729 bytes, at most 134,217,728"):
        load_json(tmp_path / "t.json", fix="restore it")
