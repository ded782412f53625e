"""Evaluation tasks: task files, what is refused in them, and samples of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rk_export.errors import InputError
from rk_export.evaluation.tasks import Task, load_tasks, make_item, read_task

GOOD = {"context": "2 + 2 =", "choices": ["4", "5"], "gold": 0}


def write(path: Path, *records: Any) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_task_file_gives_contexts_and_continuations(tmp_path: Path) -> None:
    own_contexts = {
        "context": ["He saw Ann. Ann", "He saw Bob. Bob"],
        "choices": ["left.", "left."],
        "gold": 1,
    }
    spaced = {"context": "One\n", "choices": ["two", " three\u2028"], "gold": 1}
    task = read_task(
        write(tmp_path / "sums.jsonl", GOOD, "", own_contexts, json.dumps(spaced, ensure_ascii=False))
    )

    assert (task.name, len(task.items), task.asks_for_last_word) == ("sums", 3, False)
    assert task.items[0].pairs() == [("2 + 2 =", " 4"), ("2 + 2 =", " 5")]
    assert task.items[1].pairs() == [("He saw Ann. Ann", " left."), ("He saw Bob. Bob", " left.")]
    assert task.items[2].pairs() == [("One\n", "two"), ("One\n", " three\u2028")]


def test_single_choices_ask_for_the_last_word(tmp_path: Path) -> None:
    single = {"context": "Roses are", "choices": ["red"], "gold": 0}
    assert read_task(write(tmp_path / "words.jsonl", single, single)).asks_for_last_word
    with pytest.raises(InputError, match=r"mixed: some items have a single choice.*\n.*two files"):
        read_task(write(tmp_path / "mixed.jsonl", single, GOOD))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": ', "not valid JSON"),
        ("[1]", "not a JSON object"),
        ({"context": "a", "choices": ["b", "c"]}, "has no gold"),
        ({"gold": 0}, "has no context and no choices"),
        (GOOD | {"gold": 2}, "gold 2 names none of the 2 choices"),
        (GOOD | {"gold": -1}, "gold -1 names none"),
        (GOOD | {"gold": "0"}, "gold '0' is no whole number"),
        (GOOD | {"gold": True}, "gold True is no whole number"),
        (GOOD | {"choices": []}, "choices must be a list"),
        (GOOD | {"choices": "45"}, "choices must be"),
        (GOOD | {"choices": ["4", " "]}, "choices must be"),
        (GOOD | {"context": ""}, "context must be"),
        (GOOD | {"context": ["a"]}, "context must be a text, or a list"),
        (GOOD | {"context": None}, "context must be"),
    ],
    ids=str,
)
def test_a_line_that_is_no_item_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, "", line)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:3: {re.escape(message)}") as refused:
        read_task(path)
    assert refused.value.fix


def test_a_file_without_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty: the task has no items"):
        read_task(write(tmp_path / "empty.jsonl", "", " "))
    with pytest.raises(InputError, match="no such task file"):
        read_task(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="not a text file in UTF-8"):
        read_task(tmp_path / "binary.jsonl")


def test_a_sample_is_seeded_ordered_and_part_of_a_larger_one() -> None:
    task = Task("numbers", tuple(make_item(str(number), ["a", "b"], 0) for number in range(50)))
    small, large = task.sample(10), task.sample(20)
    numbers = [int(item.contexts[0]) for item in small.items]
    assert len(numbers) == 10
    assert numbers == sorted(numbers) != list(range(10))
    assert set(small.items) < set(large.items)
    assert task.sample(10) == small != task.sample(10, seed=1)
    assert task.sample(50) is task.sample(None) is task
    with pytest.raises(InputError, match="--limit"):
        task.sample(0)


def test_tasks_are_loaded_once_each(tmp_path: Path) -> None:
    path = str(write(tmp_path / "sums.jsonl", GOOD, GOOD, GOOD))
    (task,) = load_tasks([path], limit=2)
    assert (task.name, len(task.items)) == ("sums", 2)
    with pytest.raises(InputError, match="two tasks have the same name"):
        load_tasks([path, path])


def test_a_name_without_a_file_is_told_how_to_get_one() -> None:
    with pytest.raises(InputError, match=r"^openbookqa: no such task file\n.*`python samples/assets tasks`"):
        load_tasks(["openbookqa"])
