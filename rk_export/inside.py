"""Names of files that a file of a folder gives: they stay inside that folder, links followed.

A bundle or checkpoint may come from a stranger. What it names must not make this machine read, copy or show another
file: so an absolute path, ``..`` and a link that leads out of the folder are refused.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

from rk_export.errors import InputError

_FIX = "use the folder as it was published; it names only files that lie in it"


def file_inside(folder: Path, name: object, *, where: str, fix: str = _FIX) -> Path:
    """Return a file that is named relative to a folder.

    Args:
        folder: The folder that the file must lie in, links followed.
        name: What stands for the name, of any type.
        where: The file that names it, for messages.
        fix: What to do about a name that is refused.

    Raises:
        InputError: The name is no text, is absolute or holds ``..``, or there is no such file, or it is a link out of
            the folder, or no regular file.
    """
    path = folder / checked_name(name, where=where, fix=fix)
    try:
        real = Path(os.path.realpath(path, strict=True))
        regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"names {name!r}, which cannot be read: {reason}", where=where, fix=fix) from error
    if not regular:
        raise InputError(f"names {name!r}, which is no regular file", where=where, fix=fix)
    if not _is_below(real, _homes(folder)):
        raise InputError(f"names {name!r}, a link that leads out of the folder", where=where, fix=fix)
    return path


def copy_inside(folder: Path, name: str, target: Path) -> None:
    """Copy a file of a folder into another one, under the same name.

    Raises:
        InputError: It is a link that leads out of the folder: what it shows may be private.
    """
    source = file_inside(folder, name, where=str(folder), fix="put the file itself there, if you trust it")
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target / name)


def checked_name(name: object, *, where: str, fix: str = _FIX) -> str:
    """Return a relative name that cannot lead out of its folder, as far as the text tells.

    Raises:
        InputError: It is no text, is empty, absolute, or holds ``..`` or a null byte.
    """
    if not isinstance(name, str) or not name or "\0" in name or not _is_text(name):
        raise InputError(f"{name!r} is no name of a file", where=where, fix=fix)
    as_windows = PureWindowsPath(name)  # takes both kinds of slash, and drives
    if name.startswith("/") or as_windows.anchor or ".." in as_windows.parts:
        raise InputError(f"names a file outside the folder: {name}", where=where, fix=fix)
    return name


def check_links(folder: Path) -> None:
    """Refuse a folder with a link that leads out of it.

    In the Hub's cache every file of ``snapshots/REVISION`` is a link into ``blobs`` beside it. Those are followed.

    Raises:
        InputError: Names the first such link.
    """
    homes = _homes(folder)
    for path in _links(folder):
        if not _is_below(Path(os.path.realpath(path)), homes):
            raise InputError(
                "a link that leads out of the folder",
                where=str(path),
                fix="put the file itself there, if you trust it",
            )


def _links(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):  # links to folders are listed and not entered
        yield from (path for name in (*folders, *files) if (path := Path(parent, name)).is_symlink())


def _homes(folder: Path) -> tuple[Path, ...]:
    """Return the places where the files of a folder may lie."""
    real = folder.resolve()
    cache = (real.parent.parent / "blobs",) if real.parent.name == "snapshots" else ()
    return (real, *cache)


def _is_below(path: Path, homes: tuple[Path, ...]) -> bool:
    return any(home in path.parents for home in homes)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
