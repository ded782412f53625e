"""Folders laid out as the Hub's cache keeps them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path


def snapshot(folder: Path, cache: Path, *, nested: bool = False) -> Path:
    """Store a bundle as the Hub's cache does: each file a link to a blob of another name."""
    place = cache / "snapshots" / "0123abc"
    blobs = cache / "blobs"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = hashlib.sha256(str(file).encode()).hexdigest()
        blob = blobs / (file.suffix.lstrip(".") if nested else "") / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link = place / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        levels = len(link.parent.relative_to(cache).parts)
        link.symlink_to(Path(*[".."] * levels) / blob.relative_to(cache))
    return place
