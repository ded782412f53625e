"""What a case must not do: raise what no user should see, take long or much memory, open files of others."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rk_export.errors import RkExportError

MEMORY = 1 << 30  # bytes that a case may add to what the process has mapped
SECONDS = 5.0  # of processor time
_ACCESS, _OPENED = 0x1, 0x20
_READ_BY_PYTHON = (
    "/proc",
    "/sys/fs/cgroup",
    "/usr/share",
    "/usr/lib",
    "/etc/localtime",
    "/dev/null",
    "/dev/urandom",
)
_CHANGES = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.truncate",
}
_NEVER = {
    "os.system",
    "subprocess.Popen",
    "socket.connect",
    "os.exec",
    "os.fork",
    "webbrowser.open",
    "pickle.find_class",
}


class Outside:
    """A folder of files that nobody may open; Linux tells who does, whatever the language of the library."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._handle = self._libc.inotify_init()
        if (
            self._handle < 0
            or self._libc.inotify_add_watch(self._handle, os.fsencode(folder), _ACCESS | _OPENED) < 0
        ):
            raise OSError(ctypes.get_errno(), "inotify")

    def was_opened(self) -> bool:
        found = False
        while select.select([self._handle], [], [], 0)[0]:
            os.read(self._handle, 1 << 16)
            found = True
        return found


class Audit:
    """Notes files that Python opens outside some folders, and processes and connections."""

    def __init__(self, given: Path) -> None:
        self.found: list[str] = []
        self.on = False
        own = (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), Path(__file__).parents[2])
        self._given = os.path.realpath(given)
        self._read = (self._given, *map(os.path.realpath, map(str, own)), *_READ_BY_PYTHON)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _NEVER:
            self.found.append(f"{event} {args[:1]}")
        elif event == "open" or event in _CHANGES:
            path = args[0]
            inside = event != "open" and any(
                isinstance(one, int) and one >= 0 for one in args[1:]
            )  # of an open folder
            if isinstance(path, (str, bytes)) and not inside:
                self._note(event, os.fsdecode(path), args)

    def _note(self, event: str, path: str, args: tuple[Any, ...]) -> None:
        writes = event != "open" or (
            isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if "\0" in path:
            return
        real = os.path.realpath(path)
        if event != "open":  # a link is changed itself
            real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        allowed = (self._given, "/dev/null") if writes else self._read
        if not any(real == place or real.startswith(place + "/") for place in allowed):
            self.found.append(f"{event} {real}")


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Args:
        kind: ``taken``, ``refused`` or ``failed``.
        what: Where it was refused, or one line that tells a failure from others.
        details: Of a failure, its traceback.
    """

    kind: str
    what: str = ""
    details: str = ""


class Guard:
    """Runs cases under the limits.

    Args:
        given: The folder in which cases may read and write.
        outside: The folder whose files they must not open.
    """

    def __init__(self, given: Path, outside: Path) -> None:
        self._audit, self._outside = Audit(given), Outside(outside)

    @contextmanager
    def memory_limited(self) -> Iterator[None]:
        """Refuse more than `MEMORY` beyond what the process has mapped now."""
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    def run(self, case: Callable[[], object]) -> Outcome:
        self._audit.found.clear()
        self._outside.was_opened()
        start = time.process_time()
        self._audit.on = True
        outcome = Outcome("taken")
        try:
            case()
        except RkExportError as error:
            outcome = Outcome("refused", _place(error))
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            outcome = Outcome("failed", _what(error), "".join(traceback.format_exception(error)[-12:]))
        finally:
            self._audit.on = False
        seconds = time.process_time() - start
        if seconds > SECONDS:
            return Outcome("failed", f"takes {SECONDS:.0f} s and more", outcome.details)
        if self._audit.found:
            return Outcome(
                "failed",
                f"touches a file outside: {self._audit.found[0].split('/')[0]}",
                self._audit.found[0],
            )
        if self._outside.was_opened():
            return Outcome("failed", "opens a file outside, not through Python")
        return outcome


def _place(error: BaseException) -> str:
    """Return the last place of ours that an error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame
        for frame in frames
        if any(f"/{name}/" in frame.filename for name in ("rk_export", "runtime", "passes"))
    ]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.name}:{frame.lineno}"


def _what(error: BaseException) -> str:
    """Return what tells one finding from another."""
    said = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__} in {_place(error)} ({said[:90]})"
