"""What a process that was killed left half-written beside its outputs."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from rk_export.atomic import Hidden, hidden, this_place

logger = logging.getLogger(__name__)

# A process elsewhere, or before this machine was started again, cannot be asked whether it lives.
_SILENT_SECONDS = 24 * 3600.0


def leftovers(folder: Path) -> Iterator[tuple[Path, Hidden]]:
    """Yield the half-written files and folders in a folder whose processes are gone, and what they belong to.

    Args:
        folder: Where outputs lie; folders inside are not searched.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        path = folder / name
        if (left := hidden(path)) is not None and _is_gone(path, left):
            yield path, left


def remove_leftovers(folder: Path, target: Path | None = None) -> list[Path]:
    """Remove what processes that are gone left in a folder, log each, and return what is no longer there.

    Where a process was killed between the moves of an old output and of the new one, the old one comes back.

    Args:
        folder: Where outputs lie.
        target: Only what belongs to this output; None removes all.
    """
    removed = []
    for path, left in leftovers(folder):
        if target is not None and left.target != target:
            continue
        if left.kind == "old" and not left.target.exists():
            path.rename(left.target)
            logger.warning(
                "%s: a run was killed while it replaced this output: the old one is back", left.target
            )
        else:
            remove(path)
            logger.info("removed what a killed run left half-written: %s", path)
        removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Delete a file or a folder; one that is gone already is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_gone(path: Path, left: Hidden) -> bool:
    """Whether a process ended; one that cannot be asked counts as ended after a day without a change."""
    if left.place == this_place():
        return left.process != os.getpid() and not _lives(left.process)
    try:
        newest = max(one.lstat().st_mtime for one in (path, *path.rglob("*")))
    except OSError:
        return False  # it is being changed
    return time.time() - newest > _SILENT_SECONDS


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # not ours to ask
        return True
    return True
