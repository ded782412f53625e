r"""Evaluation tasks: questions with choices, or a last word to guess; read from a file.

A task file holds one JSON object a line::

    {"context": "Question: What do bees make?\nAnswer:", "choices": ["honey", "milk"], "gold": 0}

The model reads ``context``, a space, and one of ``choices``; ``gold`` is the index of the right one. Where each choice
has a context of its own, as in WinoGrande, ``context`` is a list of as many texts. A task whose items all have a
single choice asks for the last word, as LAMBADA does: the item counts as right if greedy decoding gives that choice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rk_export.errors import InputError
from rk_export.json_codec import parse_json

_FIELDS = ("context", "choices", "gold")
_MADE_BY = (
    "name .jsonl files, separated by spaces; in a clone of rk-export `python samples/assets tasks` writes "
    "openbookqa.jsonl, arc_easy.jsonl and others, and prints their folder"
)
_FIX = 'write one object a line, like {"context": "2 + 2 =", "choices": ["4", "5"], "gold": 0}'


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        contexts: A context for each choice.
        choices: Texts that may follow their context, without the space between.
        gold: Index of the right choice.

    Raises:
        InputError: A field has the wrong type or size, or `gold` is out of range.
    """

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int

    def __post_init__(self) -> None:
        if not self.choices or not all(_is_text(choice) for choice in self.choices):
            raise InputError("must be a list of texts, none empty", where="choices")
        if len(self.contexts) != len(self.choices) or not all(_is_text(text) for text in self.contexts):
            raise InputError("must be a text, or a list of one for each choice, none empty", where="context")
        if not isinstance(self.gold, int) or isinstance(self.gold, bool):
            raise InputError(f"{self.gold!r} is no whole number", where="gold")
        if not 0 <= self.gold < len(self.choices):
            raise InputError(f"{self.gold} names none of the {len(self.choices)} choices", where="gold")

    def pairs(self) -> list[tuple[str, str]]:
        """Return context and continuation of each choice; joined, they are what the model reads."""
        return [
            (text, _spaced(text, choice)) for text, choice in zip(self.contexts, self.choices, strict=True)
        ]


@dataclass(frozen=True)
class Task:
    """Items under a name.

    Args:
        name: What the results are listed under.
        items: At least one; all with several choices, or all with a single one.

    Raises:
        InputError: There are no items, or both kinds.
    """

    name: str
    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if not self.items:
            raise InputError("the task has no items", where=self.name, fix="give at least one")
        if len({len(item.choices) == 1 for item in self.items}) > 1:
            raise InputError(
                "some items have a single choice and others several: they are scored differently",
                where=self.name,
                fix="put them into two files",
            )

    @property
    def asks_for_last_word(self) -> bool:
        """Whether every item has a single choice, which greedy decoding has to give."""
        return len(self.items[0].choices) == 1

    def sample(self, limit: int | None, seed: int = 0) -> Task:
        """Return the task with at most `limit` random items, in order.

        The sample depends on the number of items, `limit` and `seed` alone, so every model is asked the same; a smaller
        sample is part of a larger one.

        Raises:
            InputError: The limit is below 1.
        """
        if limit is not None and limit < 1:
            raise InputError(f"{limit} items cannot be asked", where="--limit", fix="give at least 1")
        if limit is None or limit >= len(self.items):
            return self
        order = random.Random(seed).sample(range(len(self.items)), len(self.items))
        return replace(self, items=tuple(self.items[index] for index in sorted(order[:limit])))


def load_tasks(files: Sequence[str | Path], limit: int | None = None, seed: int = 0) -> list[Task]:
    """Read task files; each task has the name of its file.

    Args:
        files: Paths of task files.
        limit: As in `Task.sample`.
        seed: As in `Task.sample`.

    Raises:
        InputError: Two files have the same name, or one cannot be used.
    """
    tasks = [read_task(Path(file).expanduser()) for file in files]
    if len({task.name for task in tasks}) < len(tasks):
        raise InputError("two tasks have the same name", where="--tasks", fix="name each task once")
    return [task.sample(limit, seed) for task in tasks]


def read_task(path: Path) -> Task:
    """Read a task file; empty lines count for nothing.

    Raises:
        InputError: The file is missing, empty or no UTF-8 text, or a line is no item; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise InputError("no such task file", where=str(path), fix=_MADE_BY) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"not a text file in UTF-8 ({error})", where=str(path), fix=_FIX) from error
    items = (_item(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    return Task(path.stem, tuple(items))


def _item(line: str, where: str) -> Item:
    try:
        return _parsed(line)
    except InputError as error:
        what = error.what if error.where is None else f"{error.where} {error.what}"
        raise InputError(what, where=where, fix=_FIX) from error


def _parsed(line: str) -> Item:
    record = parse_json(line.encode(), where=None, fix=_FIX)
    if not isinstance(record, dict):
        raise InputError("not a JSON object")
    if missing := [name for name in _FIELDS if name not in record]:
        raise InputError(f"has no {' and no '.join(missing)}")
    return make_item(record["context"], record["choices"], record["gold"])


def make_item(context: Any, choices: Any, gold: Any) -> Item:
    """Return an item from values whose types are not known yet.

    Args:
        context: A text for all choices, or a list of a text for each.
        choices: A list of texts.
        gold: Index of the right choice.

    Raises:
        InputError: As `Item`.
    """
    choices = tuple(choices) if isinstance(choices, list) else ()
    contexts = tuple(context) if isinstance(context, list) else (context,) * len(choices)
    return Item(contexts, choices, gold)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _spaced(context: str, choice: str) -> str:
    """Return the choice with the space that parts it from its context, unless one is there already."""
    return choice if context[-1].isspace() or choice[0].isspace() else f" {choice}"
