"""Output folders: written beside their place and moved in at the end."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

from rk_export.atomic import beside, make_folder, synchronize, synchronize_tree
from rk_export.errors import InputError
from rk_export.half_written import remove_leftovers
from rk_export.json_codec import load_json
from rk_export.manifest import MANIFEST
from rk_export.plan import PLAN_MARK
from rk_export.report.records import Report

_MARKS = (MANIFEST, "report.json", "plan.json")


class AtomicFolder:
    """Context manager that gives a temporary sibling of ``target`` and moves it into place on success.

    What is moved in is on the disk before.
    On any error the sibling is removed and what was at ``target`` stays as it was.

    Args:
        target: The final folder; its parents are made. An empty folder counts as absent.
        force: Replace an output that is already there.
        needed: Bytes that will be written, checked against the free space at entry and named when the disk
            fills up later.

    Raises:
        InputError: The output exists and ``force`` is off, rk-export did not write it, or the disk is full.
    """

    def __init__(
        self, target: str | os.PathLike[str], *, force: bool = False, needed: int | None = None
    ) -> None:
        self.target = Path(os.path.abspath(Path(target).expanduser()))
        self.force = force
        self.needed = needed
        self._partial = beside(self.target, "partial")

    def __enter__(self) -> Path:
        check_replaceable(self.target, self.force)
        if self.needed is not None:
            check_free_space(self.target, self.needed)
        try:
            make_folder(self._partial)
        except OSError as error:
            raise InputError(
                f"cannot write here: {error.strerror}",
                where=str(self.target.parent),
                fix="give another output folder, or the right to write there",
            ) from error
        return self._partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._move_in()
        except OSError as failure:
            self._raise_if_full(failure)
            raise
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._raise_if_full(error)

    def _raise_if_full(self, error: BaseException | None) -> None:
        if error is not None and is_full(error):
            raise no_space(self.target, self.needed) from error

    def _move_in(self) -> None:
        """Swap the new folder in; the old one comes back if that fails, and is deleted only afterwards."""
        synchronize_tree(self._partial)
        if not self.target.exists():
            self._partial.rename(self.target)
            synchronize(self.target.parent)
            return
        old = beside(self.target, "old")
        self.target.rename(old)
        try:
            self._partial.rename(self.target)
        except BaseException:
            old.rename(self.target)
            raise
        synchronize(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(target: Path, force: bool, *, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output place before any work; what killed runs left there half-written is removed first.

    Args:
        target: Where the output will go; it may be absent.
        force: Replace an output of rk-export that is already there.
        inputs: Files and folders that the run reads; none of them may lie in what is replaced.

    Raises:
        InputError: The place cannot be written, holds something that is not replaced, or holds what the run reads.
    """
    target = Path(os.path.abspath(target))
    try:
        remove_leftovers(target.parent, target)
        exists, real = target.exists(), target.resolve()
        for path in inputs:
            if path.resolve() == real or real in path.resolve().parents:
                raise InputError(
                    f"the output would take the place of what is read ({path})",
                    where=str(target),
                    fix="give another output folder",
                )
        if exists:
            _check_existing(target, force)
        _check_writable(target.parent)
    except OSError as error:
        raise InputError(
            f"cannot be used as an output: {error.strerror}",
            where=str(target),
            fix="give another output folder",
        ) from error


def check_plan_place(target: Path, force: bool) -> None:
    """Refuse, before any work, a place where no plan can be written; only a plan is replaced.

    Raises:
        InputError: The folder is missing, or the place holds something that is not replaced.
    """
    if not target.parent.is_dir():
        raise InputError("no such folder", where=str(target.parent), fix="make it, or give another name")
    _check_writable(target.parent)
    if target.is_dir():
        raise InputError("is a folder", where=str(target), fix="give the name of a file")
    if not target.exists():
        return
    if not force:
        raise InputError("exists already", where=str(target), fix="choose another name or give --force")
    try:
        is_plan = PLAN_MARK in load_json(target, fix="")
    except (InputError, TypeError):
        is_plan = False
    if not is_plan:
        raise InputError("not replaced: the file is no plan", where=str(target), fix="choose another name")


def _check_existing(target: Path, force: bool) -> None:
    if not target.is_dir():
        raise InputError("exists and is not a folder", where=str(target), fix="give another output folder")
    if not any(target.iterdir()):
        return
    if not force:
        raise InputError(
            "the output already exists", where=str(target), fix="add --force, or give another folder"
        )
    if not _is_ours(target):
        raise InputError(
            "not replaced: the folder was not written by rk-export",
            where=str(target),
            fix="delete it yourself, or give another output folder",
        )


def _check_writable(folder: Path) -> None:
    """Refuse a place under which no folder can be made."""
    place = folder
    while not place.exists():
        place = place.parent
    reason = None
    if not place.is_dir():
        reason = os.strerror(errno.ENOTDIR)
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = os.strerror(errno.EACCES)
    if reason is not None:
        raise InputError(
            f"cannot write here: {reason}",
            where=str(place),
            fix="give another output folder, or the right to write there",
        )


def _is_ours(folder: Path) -> bool:
    """Whether rk-export wrote the folder: bundle, report or compressed checkpoint, but no plain model."""
    if any((folder / name).is_file() for name in _MARKS):
        return True
    try:
        return "rk_export" in load_json(folder / "config.json", fix="")
    except (InputError, TypeError):
        return False


def check_free_space(path: str | os.PathLike[str], needed: int) -> None:
    """Raise InputError unless the file system that will hold ``path`` has ``needed`` bytes free."""
    place = Path(os.path.abspath(Path(path).expanduser()))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise no_space(Path(path), needed, free)


def is_full(error: BaseException) -> bool:
    """Return whether a write failed for want of space; NumPy's `tofile` and safetensors say so in words only."""
    if isinstance(error, SafetensorError):
        return re.search(rf"\(os error ({errno.ENOSPC}|{errno.EDQUOT})\)", str(error)) is not None
    if not isinstance(error, OSError):
        return False
    if error.errno is None:
        return re.search(r"\d+ requested and \d+ written", str(error)) is not None
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_space(path: Path, needed: int | None = None, free: int | None = None) -> InputError:
    """Return the error of a full disk.

    Args:
        path: What lies there, or should.
        needed: Bytes, where that is known.
        free: The same.
    """
    what = "no space left on the disk"
    if needed is not None:
        what += f": {needed:,} bytes are needed"
    if free is not None:
        what += f", {free:,} are free"
    return InputError(what, where=str(path), fix="free some space, or give a folder on another disk")


def read_report(folder: str | os.PathLike[str]) -> Report:
    """Return the report of a bundle or of a folder of spectra.

    Args:
        folder: What `compress`, `export` or `analyze` wrote.

    Raises:
        InputError: The folder holds no report, or a broken one.
    """
    path = Path(folder).expanduser() / "report.json"
    if not path.is_file():
        raise InputError(
            "no report here: neither a bundle nor a folder of spectra",
            where=str(folder),
            fix="give a folder that compress, export or analyze wrote",
        )
    return Report.load(path)
