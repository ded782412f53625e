"""Which families a run of the tests takes, and where it leaves what it measured.

A normal run takes all families through the quick tests and a sample through the long ones. `make families` sets
``RK_FAMILIES=all``; ``RK_FAMILIES=phi,falcon:alibi`` takes what is named, through all of them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tiny_models import EVERY_MODEL

T = TypeVar("T")

_ASKED = os.environ.get("RK_FAMILIES", "")
_RESULTS = os.environ.get("RK_FAMILIES_RESULTS")
EVERYTHING = bool(_ASKED)


def families() -> tuple[str, ...]:
    """Return the models, `FAMILY` or `FAMILY:VARIANT`, that were asked for, or all of them.

    Raises:
        ValueError: The environment variable names something else.
    """
    if _ASKED in ("", "all"):
        return EVERY_MODEL
    asked = _ASKED.split(",")
    found = tuple(name for name in EVERY_MODEL if name in asked or name.partition(":")[0] in asked)
    if unknown := sorted(set(asked) - {*found, *(name.partition(":")[0] for name in found)}):
        raise ValueError(f"RK_FAMILIES names no family of tests/tiny_families: {', '.join(unknown)}")
    return found


def sampled(cases: Iterable[T], one_in: int, key: Any = str) -> list[T]:
    """Return one case in so many, the same ones in every run, or all cases of a run of everything."""
    return [case for case in cases if EVERYTHING or zlib.crc32(key(case).encode()) % one_in == 0]


def in_turn(names: Sequence[str], cases: Sequence[T]) -> list[tuple[str, T]]:
    """Return every name with every case in a run of everything, else each name with one case, all cases in turn."""
    if EVERYTHING:
        return [(name, case) for name in names for case in cases]
    return [(name, cases[index % len(cases)]) for index, name in enumerate(names)]


def record(name: str, test: str, values: Any) -> None:
    """Leave a result for `families_page.py` where the environment says, else nowhere."""
    if _RESULTS:
        folder = Path(_RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name.replace(':', '@')}.{test}.json"
        path.write_text(json.dumps({"model": name, "test": test, "values": values}, indent=1), "utf-8")
