"""Keeps whole runs out of the unit tests: a test that takes a model to its graph says so with a marker.

What `make unit` leaves out is known by the markers alone, so a run that is not marked must fail rather than slow it
down.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest

MARKERS = ("whole", "real_model")
# Fixtures that a whole run makes, and that later tests find made: the name alone says what a test needs.
FIXTURES = {"bundle", "own_bundle", "smollm2_int4"}
COMMANDS = re.compile(r"(?<![\w./-])(compress|export)(?![\w./-])")

_current: list[pytest.Item] = []


def install() -> None:
    """Guard what makes a model's graph. To be called before test files are imported: they keep what they import."""
    from rk_export.graph import build

    _guard(build, "build_graph", lambda *_, **__: True)
    _guard(subprocess.Popen, "__init__", lambda _, args, *__, **___: _makes_a_bundle(args))


def enter(item: pytest.Item) -> None:
    """Note which test runs from here on, and fail it if it asks for what only whole runs make."""
    _current[:] = [item]
    if FIXTURES & set(getattr(item, "fixturenames", ())):
        refuse_unmarked("uses a bundle")


def refuse_unmarked(what: str) -> None:
    """Fail the test that runs, unless it is marked."""
    for item in _current:
        if not any(item.get_closest_marker(name) for name in MARKERS):
            pytest.fail(f"{item.nodeid} {what}: mark it with pytest.mark.whole", pytrace=False)


def _guard(owner: Any, name: str, concerns: Callable[..., bool]) -> None:
    function = getattr(owner, name)
    if hasattr(function, "guarded"):
        return

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if concerns(*args, **kwargs):
            refuse_unmarked("makes the graph of a model")
        return function(*args, **kwargs)

    guarded.guarded = True  # type: ignore[attr-defined]
    setattr(owner, name, guarded)


def _makes_a_bundle(command: Any) -> bool:
    """Whether a process is our command line with a command that makes a bundle."""
    text = command if isinstance(command, str) else " ".join(map(str, command))
    return "rk_export.cli" in text and COMMANDS.search(text) is not None
