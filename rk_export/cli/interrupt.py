"""A command that is ended from outside: what it leaves for the next run, and the one line that says so."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rk_export.methods import METHODS
from rk_export.work_folder import finished_layers, state_file, work_folder_of

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """The system asks the process to end. It unwinds like an interrupt, so that what is half written goes away."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` in the main thread when SIGTERM comes, as Python raises KeyboardInterrupt for SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(TERMINATED)


def farewell(args: argparse.Namespace, words: Sequence[str], begin: float) -> tuple[list[str], str]:
    """Return what an interrupted command leaves for the next run, and the command that goes on from there.

    Args:
        args: Its parsed arguments.
        words: Its command line.
        begin: When it began, in seconds since the epoch.
    """
    kept, again = [*_states(args), *_cached(begin), *_downloads(args)], list(words)
    checkpoint = getattr(args, "checkpoint", None)
    if checkpoint is not None and _written_since(Path(checkpoint) / "config.json", begin):
        kept.append(f"the checkpoint {checkpoint}")
        again += [] if "--force" in again else ["--force"]  # the next run writes it once more
    return kept, shlex.join(again)


def _states(args: argparse.Namespace) -> Iterator[str]:
    """Yield the states of trainings and the finished layers that wait beside the output."""
    if (out := getattr(args, "output", None)) is None:
        return
    for method in METHODS:
        path = state_file(Path(out), method.name)
        if path.is_file():
            yield f"the state of {method.name} ({path})"
    if count := finished_layers(Path(out)):
        yield f"{count} finished layers ({work_folder_of(Path(out))})"


def _cached(begin: float) -> Iterator[str]:
    """Yield what was put into the cache since the command began; nothing was before the cache's module came."""
    cache = sys.modules.get("rk_export.tensor_cache")
    root = None if cache is None else cache.cache_root()
    if root is None or not root.is_dir():
        return
    kinds = {path.relative_to(root).parts[0] for path in root.glob("*/**/*") if _written_since(path, begin)}
    if kinds:
        yield f"{', '.join(sorted(kind.replace('-', ' ') for kind in kinds))} (in {root})"


def _downloads(args: argparse.Namespace) -> Iterator[str]:
    """Yield that files came from the hub, where the model is named by its id there."""
    model = getattr(args, "model", None)
    if isinstance(model, str) and model.count("/") == 1 and not Path(model).expanduser().exists():
        yield "the files that the hub delivered"


def _written_since(path: Path, begin: float) -> bool:
    try:
        return path.is_file() and path.stat().st_mtime >= begin
    except OSError:  # gone meanwhile
        return False
