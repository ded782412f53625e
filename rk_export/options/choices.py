"""One of a few values, or an error that lists them."""

from __future__ import annotations

from rk_export.errors import FieldError


def require_choice(kind: str, value: object, choices: tuple[object, ...], where: str) -> None:
    """Refuse a value that is none of some choices.

    Raises:
        InputError: Lists them.
    """
    if value not in choices:
        *some, last = [str(choice) for choice in choices if choice is not None]
        raise FieldError(f"unknown {kind} {value!r}", where=where, fix=f"choose {', '.join(some)} or {last}")
