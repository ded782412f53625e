"""The manifest of a bundle: size and SHA-256 of every file, written once and checked by whoever opens the bundle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

from rk_export.atomic import atomic_file
from rk_export.errors import InputError
from rk_export.inside import checked_name, file_inside
from rk_export.json_codec import load_json
from rk_export.progress import stage

MANIFEST = "rk_manifest.json"
SIGNATURE = f"{MANIFEST}.sig"
logger = logging.getLogger(__name__)

_FORMAT = 1
_BLOCK = 1 << 20
_LONG = 512  # blocks of a file whose checksum takes more than a second or two
_AGAIN = "copy or export the bundle again"
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
    manifest = read_manifest(root)
    if (root / SIGNATURE).exists():
        (root / SIGNATURE).unlink()
        logger.warning("%s: the signature was of the bundle as it was, and is removed; sign it again", root)
    kept = {file: entry for file, entry in manifest["files"].items() if file.split("/")[0] not in names}
    added = {file: entry for name in names for file, entry in _entries(root, root / name).items()}
    _write_json(root, {**manifest, "files": dict(sorted({**kept, **added}.items()))})


def write_part(bundle: str | os.PathLike[str], folder: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Write the manifest of a folder that holds some files of a bundle under the same names.

    Args:
        bundle: A bundle with a manifest, from which the checksums are taken.
        folder: Where the files lie a second time.
        names: The files, by path.
    """
    manifest = read_manifest(Path(bundle))
    _write_json(Path(folder), {**manifest, "files": {name: manifest["files"][name] for name in names}})


def files_of(root: Path) -> list[str]:
    """Return what a manifest lists: every file of a bundle but the manifest and its signature, by path."""
    own = (root / MANIFEST, root / SIGNATURE)
    return sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path not in own
    )


def _entries(root: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and checksum of every file below a folder by its path below the root."""
    digests: dict[tuple[int, int], str] = {}
    files = {}
    for name in files_of(root):
        path = root / name
        if folder not in path.parents:
            continue
        stat = path.stat()
        inode = (stat.st_dev, stat.st_ino)
        if inode not in digests:
            digests[inode] = sha256_of(path)
        files[name] = {"bytes": stat.st_size, "sha256": digests[inode]}
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
        InputError: No readable manifest, or a file is missing, changed, or a link out of the bundle; the first one is
            named.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, entry in files.items():
        checked_name(name, where=str(root / MANIFEST), fix=_AGAIN)
        path = root / name
        if not os.path.isfile(path):  # it takes names that no file can have
            raise InputError("listed in the manifest but missing", where=str(path), fix=_AGAIN)
        file_inside(root, name, where=str(root / MANIFEST), fix=_AGAIN)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise InputError(
                f"corrupted: {size:,} bytes instead of {entry['bytes']:,}", where=str(path), fix=_AGAIN
            )
    for name, entry in files.items() if hashes else ():
        if sha256_of(root / name) != entry["sha256"]:
            raise InputError(
                "corrupted: its checksum differs from the manifest", where=str(root / name), fix=_AGAIN
            )
    return manifest


def read_manifest(root: Path) -> dict[str, Any]:
    """Return the manifest of a bundle; the files that it lists are not looked at.

    Raises:
        InputError: There is none, or it is not readable, or of another format.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise InputError(
            "no bundle here: rk_manifest.json is missing",
            where=str(root),
            fix="give a folder that rk-export wrote",
        )
    manifest = load_json(path, fix=_AGAIN)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise InputError("the manifest is not readable: it lists no files", where=str(path), fix=_AGAIN)
    if manifest.get("format") != _FORMAT or not all(map(_is_entry, manifest["files"].values())):
        raise InputError(
            "the manifest is of another format", where=str(path), fix="export with this rk-export version"
        )
    return manifest


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and entry["bytes"] >= 0
        and isinstance(entry.get("sha256"), str)
    )
