"""What a command shows while it works: log lines, and below them on a terminal a bar a stage; and its results."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from rk_export.progress import shown_by

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from rk_export.report.table import Block

_FRAMES_A_SECOND = 4
_AVERAGED_SECONDS = 3600.0  # a layer of a large model takes minutes: the time that is left needs several


@contextmanager
def work_shown(*, bars: bool, quiet: bool = False) -> Iterator[None]:
    """Send log lines to standard error, and show stages there.

    Args:
        bars: Show a bar a stage where standard error is a terminal; otherwise stages are log lines.
        quiet: Show neither, and no warnings; what is worth knowing later is in the results.
    """
    level = logging.ERROR if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", handlers=[_StandardError()], force=True)
    if quiet:
        with _libraries_silent():
            yield
        return
    if not (bars and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"):
        yield
        return
    screen = _Screen()
    try:
        with shown_by(screen.open_bar):
            yield
    finally:
        screen.close()  # an error leaves loops where they are: the terminal must not wait for them


@contextmanager
def _libraries_silent() -> Iterator[None]:
    """Keep away what libraries write to standard error by themselves: warnings, and bars of downloads."""
    asked = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # read when they are imported
    before = {name: os.environ.get(name) for name in asked}
    os.environ.update(asked)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to standard error as it is now: while bars are shown, lines go above them."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Screen:
    """Bars on standard error, as long as a stage runs; none is left behind."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def open_bar(self, title: str, total: int, done: int) -> _Bar:
        """Show one more bar."""
        if self._progress is None:
            self._progress = _progress()
            self._progress.start()
        task = self._progress.add_task(title, total=total, completed=done, note="")
        return _Bar(self, self._progress, task)

    def remove(self, progress: Progress, task: TaskID) -> None:
        """Take a bar away; with the last one the cursor comes back."""
        if progress is self._progress:
            progress.remove_task(task)
            if not progress.task_ids:
                self.close()

    def close(self) -> None:
        """Take all bars away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Bar:
    """One stage on the screen."""

    def __init__(self, screen: _Screen, progress: Progress, task: TaskID) -> None:
        self._screen, self._progress, self._task = screen, progress, task

    def advance(self, count: int = 1, note: str = "") -> None:
        """Move on."""
        self._progress.update(self._task, advance=count, note=note)

    def close(self) -> None:
        """Vanish."""
        self._screen.remove(self._progress, self._task)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False, style="dim"),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # results go where they were sent
        refresh_per_second=_FRAMES_A_SECOND,
        speed_estimate_period=_AVERAGED_SECONDS,
    )


def print_json(data: object) -> None:
    """Print a result as the one JSON document of standard output."""
    print(json.dumps(data, indent=1, ensure_ascii=False))


def show(*blocks: Block) -> None:
    """Print results: on a terminal in color and folded to its width, elsewhere as plain text."""
    if not sys.stdout.isatty():
        from rk_export.report.table import plain_text

        print(plain_text(blocks))
        return
    for number, block in enumerate(blocks):
        if number:
            print()
        _print(block)


def _print(block: Block) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if isinstance(block, str):
        console.print(Text(block), soft_wrap=True)
        return
    if block.title:
        console.print(Text(block.title, style="bold"))
    if block.least_width > console.width:
        print(replace(block, title="").text())  # the terminal breaks the lines: nothing is cut off
    else:
        console.print(block.for_terminal())
