"""What the cache holds, how large it may be, and what goes first when it is larger.

An entry is a file of tensors, `KIND/DIGEST.safetensors`, or a converted model, `gguf/DIGEST-vFORMAT/`. Its time of
change says when it was used last. Nothing else in the cache's folder is touched, wherever `RK_EXPORT_CACHE` points.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a folder that is in use cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

from rk_export.atomic import beside, make_folder
from rk_export.errors import InputError
from rk_export.half_written import leftovers, remove_leftovers
from rk_export.options.ranks import bytes_of
from rk_export.report.humanize import size

logger = logging.getLogger(__name__)

VARIABLE = "RK_EXPORT_CACHE_LIMIT"
MOST_BYTES, DISK_SHARE = 20e9, 0.1  # the default limit is the smaller one of both
ASSETS = "assets"  # downloads of the samples: they are listed, and go only when they are named

_FILE = re.compile(r"[0-9a-f]{32}\.safetensors")
_FOLDER = re.compile(r"[0-9a-f]{16}-v\d+")

_used: set[Path] = set()
_held: dict[Path, int] = {}
_said: set[Path] = set()


@dataclass(frozen=True)
class CacheEntry:
    """What is kept, or removed, as one.

    Args:
        kind: The folder in the cache, such as ``self-text``.
        path: A file or a folder.
        files: How many files it has.
        bytes: How many bytes they have.
        used: When it was last written or used, in seconds since the epoch.
    """

    kind: str
    path: Path
    files: int
    bytes: int
    used: float


def cache_limit(root: Path) -> int:
    """Return the bytes that the cache may hold.

    That is what the environment says, or the smaller one of 20 GB and a tenth of the disk.

    Args:
        root: The folder of the cache.

    Raises:
        InputError: The environment says something that is no size.
    """
    if text := os.environ.get(VARIABLE):
        return cache_bytes(text, VARIABLE)
    return int(min(MOST_BYTES, DISK_SHARE * shutil.disk_usage(_existing(root)).total))


def cache_bytes(text: str, where: str) -> int:
    """Return the bytes of a size such as ``20GB``.

    Raises:
        InputError: It is no size, and was given there.
    """
    try:
        return int(float(bytes_of(text)))
    except (InputError, ValueError) as error:
        raise InputError(f"{text!r} is no size", where=where, fix="write 20GB or 500MB") from error


@contextmanager
def chosen_limit(text: str | None) -> Iterator[None]:
    """Let a size take the place of the environment's while the context lasts, also in processes that are started.

    Args:
        text: The size; None leaves the environment's.

    Raises:
        InputError: The size is none, here or in the environment.
    """
    before = os.environ.get(VARIABLE)
    if text is not None:
        os.environ[VARIABLE] = str(cache_bytes(text, "--cache-limit"))
    elif before:
        cache_bytes(before, VARIABLE)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def _existing(place: Path) -> Path:
    while not place.exists():
        place = place.parent
    return place


def cache_entries(root: Path) -> list[CacheEntry]:
    """Return what the cache holds; what was not used for the longest time comes first."""
    found = (_entry(kind.name, path) for kind in _kinds(root) for path in kind.iterdir() if is_entry(path))
    return sorted((entry for entry in found if entry), key=lambda entry: (entry.used, entry.path))


def _kinds(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (path for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink())


def is_entry(path: Path) -> bool:
    """Whether a path in the folder of a kind is an entry, and nothing else that lies there."""
    if path.is_symlink():
        return False
    if path.parent.name == ASSETS:
        return not path.name.startswith(".")
    return bool(_FOLDER.fullmatch(path.name)) if path.is_dir() else bool(_FILE.fullmatch(path.name))


def _entry(kind: str, path: Path) -> CacheEntry | None:
    """Return an entry, or None where another process removes it."""
    try:
        sizes, used = [one.lstat().st_size for one in _files(path)], path.stat().st_mtime
    except OSError:
        return None
    return CacheEntry(kind, path, len(sizes), sum(sizes), used)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]


def use(path: Path) -> None:
    """Note that an entry is used now: it stays until this process ends, and it is the last to go afterwards.

    Other processes learn of a folder from a lock. A file needs none: whoever reads it has it open.

    Args:
        path: The entry.

    Raises:
        FileNotFoundError: There is no such entry.
    """
    path = path.absolute()
    if path.is_dir() and path not in _held:
        _held[path] = os.open(path, os.O_RDONLY) if fcntl is not None else -1
        _lock(_held[path], exclusive=False)
    _used.add(path)
    try:
        os.utime(path)
    except PermissionError as error:  # a cache that may only be read
        logger.debug("not noted as used: %s: %s", path, error)


def use_folder(path: Path) -> None:
    """Use the folder of an entry, which is made where it is missing.

    Raises:
        InputError: It cannot be made.
    """
    while True:
        try:
            make_folder(path)
            use(path)
        except FileNotFoundError:
            continue  # another process removed it between both lines
        except OSError as error:
            what, fix = f"cannot write here: {error.strerror}", "let RK_EXPORT_CACHE name another folder"
            raise InputError(what, where=str(path), fix=fix) from error
        if path.is_dir() and (fcntl is None or path.stat().st_ino == os.fstat(_held[path.absolute()]).st_ino):
            return
        release(path)


def release(path: Path) -> None:
    """Take back that an entry is used."""
    path = path.absolute()
    _used.discard(path)
    if (handle := _held.pop(path, -1)) >= 0:
        os.close(handle)


def _lock(handle: int, *, exclusive: bool) -> bool:
    """Lock an open folder; return False where another process has it, and True where there are no locks."""
    if fcntl is None:
        return True
    kind = fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(handle, kind)
    except OSError as error:  # some network file systems lock no folders
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


@contextmanager
def _ours_alone(path: Path) -> Iterator[bool]:
    """Give whether nobody uses an entry, and keep others from a folder as long as the context lasts."""
    path = path.absolute()
    if path in _used or fcntl is None or not path.is_dir():
        yield path not in _used
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        yield _lock(handle, exclusive=True)
    finally:
        os.close(handle)


def is_used(entry: CacheEntry) -> bool:
    """Whether this process uses an entry, or another process a folder."""
    try:
        with _ours_alone(entry.path) as free:
            return not free
    except FileNotFoundError:
        return False


def remove_entry(entry: CacheEntry) -> bool:
    """Remove an entry and return True, or leave it because it is used; a folder vanishes in one step."""
    try:
        with _ours_alone(entry.path) as free:
            if not free:
                return False
            if not entry.path.is_dir():
                entry.path.unlink()
                return True
            away = beside(entry.path, "partial")
            entry.path.rename(away)
        shutil.rmtree(away)
    except FileNotFoundError:
        logger.debug("another process removed it: %s", entry.path)
    return True


def keep_within_limit(root: Path) -> list[CacheEntry]:
    """Remove what was not used for the longest time until the cache is within its limit; log and return what went.

    What this run used stays, and what the samples downloaded. So the cache may stay larger; the log says that once.

    Raises:
        InputError: The environment asks for a limit that is no size.
    """
    removed: list[CacheEntry] = []
    try:
        remove_cache_leftovers(root)
        removed += _over(root, cache_limit(root))
    except OSError as error:
        logger.warning("the cache is not kept within its limit: %s", error)
    return removed


def _over(root: Path, limit: int) -> Iterator[CacheEntry]:
    """Remove entries until the limit holds, and yield each."""
    entries = [entry for entry in cache_entries(root) if entry.kind != ASSETS]
    total = sum(entry.bytes for entry in entries)
    for entry in entries:
        if total <= limit:
            return
        if remove_entry(entry):
            total -= entry.bytes
            logger.info("removed from the cache: %s", in_words(entry))
            yield entry
    if total > limit and root not in _said:
        _said.add(root)
        text = "the cache is larger than its limit, %s of %s (%s): all of it is used now"
        logger.info(text, size(total), size(limit), VARIABLE)


def in_words(entry: CacheEntry) -> str:
    """Return an entry with its size and when it was used last."""
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    return f"{entry.kind}/{entry.path.name}, {size(entry.bytes)}, last used {day}"


def cache_leftovers(root: Path) -> list[Path]:
    """Return what killed runs left half-written in the cache."""
    return [path for folder in _folders(root) for path, _ in leftovers(folder)]


def remove_cache_leftovers(root: Path) -> list[Path]:
    """Remove what killed runs left half-written in the cache and return it."""
    return [path for folder in _folders(root) for path in remove_leftovers(folder)]


def _folders(root: Path) -> list[Path]:
    """Return the folders in which the cache writes."""
    kinds = list(_kinds(root))
    converted = [path for kind in kinds for path in kind.iterdir() if _FOLDER.fullmatch(path.name)]
    return [root, *kinds, *converted]
