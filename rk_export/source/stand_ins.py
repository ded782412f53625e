"""What lies in a file's place when something else was downloaded."""

from __future__ import annotations

from pathlib import Path

_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"<?xml": "a web page",
}


def stand_in(path: Path) -> str | None:
    """Return what a file is instead of itself, by its first bytes; None where nothing is known or to be read."""
    try:
        with path.open("rb") as handle:
            start = handle.read(64).lstrip().lower()
    except OSError:
        return None
    return next((kind for beginning, kind in _BEGINNINGS.items() if start.startswith(beginning)), None)
