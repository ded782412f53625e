"""Outputs are written beside their place and moved in when they are complete: the one way to write a file.

What is moved in is on the disk before it gets its name, and the name is on the disk before the run goes on. So a lost
power plug leaves the old output or the new one, and never a name without its content.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["partial", "old"]

_NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # where folders cannot be synchronized
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old)-(?P<place>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}")


@dataclass(frozen=True)
class Hidden:
    """Who left a path that `beside` named.

    Args:
        target: The output that it belongs to.
        kind: What lies there.
        place: Where the process ran; see `this_place`.
        process: Its id there.
    """

    target: Path
    kind: Kind
    place: str
    process: int


def beside(target: Path, kind: Kind) -> Path:
    """Return a hidden path that nobody uses yet, in the same folder as an output; it names the process.

    Args:
        target: The output.
        kind: What lies there: ``partial`` or ``old``.
    """
    return target.with_name(f".{target.name}.{kind}-{this_place()}-{os.getpid()}-{secrets.token_hex(4)}")


def hidden(path: Path) -> Hidden | None:
    """Return who left a path, or None where `beside` did not name it."""
    found = _HIDDEN.fullmatch(path.name)
    if found is None:
        return None
    kind: Kind = "old" if found["kind"] == "old" else "partial"
    return Hidden(path.with_name(found["name"]), kind, found["place"], int(found["pid"]))


@functools.cache
def this_place() -> str:
    """Return what tells where ids of processes are known: the machine since it was started, and the container."""
    parts = [socket.gethostname()]
    for place, read in (("/proc/sys/kernel/random/boot_id", _text), ("/proc/self/ns/pid", os.readlink)):
        try:
            parts.append(read(place))
        except OSError:  # not Linux
            parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _text(place: str) -> str:
    return Path(place).read_text(encoding="ascii")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, and move that file to ``path`` on success; on any error ``path`` stays as it was.

    Args:
        path: The file; its parents are made.

    Raises:
        OSError: The folder cannot be made or written to, or the disk is full.
    """
    partial = beside(path, "partial")
    make_folder(path.parent)
    try:
        yield partial
        synchronize(partial)
        os.replace(partial, path)
        synchronize(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each with its name on the disk; what is there already stays."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        synchronize(one.parent)


def synchronize(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Raises:
        OSError: The disk cannot take it.
    """
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # folders cannot be opened there
    try:
        # Windows wants the right to write; elsewhere a file that may only be read is synchronized, too.
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not (is_folder and error.errno in _NO_FOLDERS):
            raise


def synchronize_tree(folder: Path) -> None:
    """Wait until a folder is on the disk with everything in it, what is inside before what holds it."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            if not (path := Path(root, name)).is_symlink():
                synchronize(path)
        synchronize(Path(root))
