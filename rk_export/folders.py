"""Output folders: written beside their place and moved in at the end, with a manifest of checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from rk_export.atomic import atomic_file, beside, make_folder, synchronize, synchronize_tree
from rk_export.errors import InputError
from rk_export.half_written import remove_leftovers
from rk_export.plan import PLAN_MARK
from rk_export.progress import stage
from rk_export.report.records import Report

MANIFEST = "rk_manifest.json"
_FORMAT = 1
_BLOCK = 1 << 20
_LONG = 512  # blocks of a file whose checksum takes more than a second or two
_MARKS = (MANIFEST, "report.json", "plan.json")
_LIBRARIES = (
    "rk-export",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "mobius-onnx",
    "onnxruntime-gpu",
)


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
        is_plan = PLAN_MARK in json.loads(target.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
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
        return "rk_export" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
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


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal SHA-256 of a file, read in blocks of 1 MiB; that of a large one shows its progress."""
    digest, blocks = hashlib.sha256(), -(-os.path.getsize(path) // _BLOCK)
    with open(path, "rb") as handle:
        shown = stage(f"checksum of {Path(path).name}, MiB", blocks) if blocks > _LONG else nullcontext()
        with shown as bar:
            while block := handle.read(_BLOCK):
                digest.update(block)
                if bar is not None:
                    bar.advance()
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that decide what a bundle contains."""
    found = {name: _version(name) for name in _LIBRARIES}
    return {name: version for name, version in found.items() if version is not None}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def write_manifest(folder: str | os.PathLike[str], info: dict[str, Any]) -> Path:
    """Write ``rk_manifest.json``: ``info``, library versions, size and SHA-256 of every file.

    Args:
        folder: A finished bundle; files in subfolders are listed too, hard links hashed once.
        info: JSON-ready facts of the run; ``format``, ``versions`` and ``files`` are the manifest's own keys.
    """
    root = Path(folder)
    files = _entries(root, root)
    return _write_json(root, {**info, "format": _FORMAT, "versions": library_versions(), "files": files})


def replace_in_manifest(folder: str | os.PathLike[str], names: Sequence[str]) -> None:
    """List what lies in some of a bundle's subfolders anew; the entries of all other files stay as they are.

    Args:
        folder: A bundle with a manifest.
        names: The subfolders.
    """
    root = Path(folder)
    manifest = _read_manifest(root)
    kept = {file: entry for file, entry in manifest["files"].items() if file.split("/")[0] not in names}
    added = {file: entry for name in names for file, entry in _entries(root, root / name).items()}
    _write_json(root, {**manifest, "files": dict(sorted({**kept, **added}.items()))})


def _entries(root: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and checksum of every file below a folder by its path below the root."""
    digests: dict[tuple[int, int], str] = {}
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != root / MANIFEST):
        stat = path.stat()
        inode = (stat.st_dev, stat.st_ino)
        if inode not in digests:
            digests[inode] = sha256_of(path)
        files[path.relative_to(root).as_posix()] = {"bytes": stat.st_size, "sha256": digests[inode]}
    return files


def _write_json(root: Path, manifest: dict[str, Any]) -> Path:
    with atomic_file(root / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return root / MANIFEST


def check_manifest(folder: str | os.PathLike[str], *, hashes: bool = True) -> dict[str, Any]:
    """Return the manifest of a bundle after checking every file it lists, all sizes before any checksum.

    Args:
        folder: The bundle.
        hashes: Also compare checksums; without them a gigabyte bundle is checked in milliseconds.

    Raises:
        InputError: No readable manifest, or a file is missing or changed; the first one is named.
    """
    root = Path(folder)
    manifest = _read_manifest(root)
    files: dict[str, dict[str, Any]] = manifest["files"]
    fix = "copy or export the bundle again"
    for name, entry in files.items():
        path = root / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(
                f"the manifest lists {name}, which is outside the bundle", where=str(root), fix=fix
            )
        if not path.is_file():
            raise InputError("listed in the manifest but missing", where=str(path), fix=fix)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise InputError(
                f"corrupted: {size:,} bytes instead of {entry['bytes']:,}", where=str(path), fix=fix
            )
    for name, entry in files.items() if hashes else ():
        if sha256_of(root / name) != entry["sha256"]:
            raise InputError(
                "corrupted: its checksum differs from the manifest", where=str(root / name), fix=fix
            )
    return manifest


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


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise InputError(
            "no bundle here: rk_manifest.json is missing",
            where=str(root),
            fix="give a folder that rk-export wrote",
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == _FORMAT
        entries_ok = all({"bytes", "sha256"} <= entry.keys() for entry in manifest["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "the manifest is not readable", where=str(path), fix="copy or export the bundle again"
        ) from error
    if not (known and entries_ok):
        raise InputError(
            "the manifest is of another format", where=str(path), fix="export with this rk-export version"
        )
    return dict(manifest)
