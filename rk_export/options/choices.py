"""One of a few values, or an error that lists them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from rk_export.errors import FieldError


def require_choice(kind: str, value: object, choices: tuple[object, ...], where: str) -> None:
    """Refuse a value that is none of some choices.

    Raises:
        InputError: Lists them.
    """
    if value not in choices:
        *some, last = [str(choice) for choice in choices if choice is not None]
        raise FieldError(f"unknown {kind} {value!r}", where=where, fix=f"choose {', '.join(some)} or {last}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean X? `` for the known name that is most like another one, or nothing."""
    found = get_close_matches(name, list(known), n=1)
    return f"did you mean {found[0]}? " if found else ""
