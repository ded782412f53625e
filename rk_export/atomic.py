"""Outputs are written beside their place and moved in when they are complete: the one way to write a file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def beside(target: Path, kind: str) -> Path:
    """Return a hidden path that nobody uses yet, in the same folder as an output.

    Args:
        target: The output.
        kind: What lies there: ``partial`` or ``old``.
    """
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, and move that file to ``path`` on success; on any error ``path`` stays as it was.

    Args:
        path: The file; its parents are made.

    Raises:
        OSError: The folder cannot be made or written to, or the disk is full.
    """
    partial = beside(path, "partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
