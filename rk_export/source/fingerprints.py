"""What a model's tensors are known by: the content of its files, which is read once as long as they stay the same."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from rk_export.atomic import atomic_file
from rk_export.manifest import sha256_of
from rk_export.tensor_cache import cache_root

logger = logging.getLogger(__name__)

INDEX = "fingerprints.json"
_MOST = 10_000  # files that are remembered; the oldest entries go


def files_fingerprint(files: Iterable[Path], cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Return the SHA-256 over the content of files, in their order.

    Args:
        files: The files.
        cache_dir: The cache with the index of digests; ``~/.cache/rk-export`` when None.
    """
    path = cache_root(cache_dir) / INDEX
    known = _read(path)
    digests, made = [], dict[str, list[object]]()
    for file in files:
        place, state = str(file.resolve()), _state(file)
        if (entry := known.get(place)) and entry[:2] == state:
            digests.append(str(entry[2]))
            continue
        digests.append(sha256_of(file))
        made[place] = [*state, digests[-1]]
    if made:
        index = json.dumps(dict(list({**_read(path), **made}.items())[-_MOST:]))
        try:
            with atomic_file(path) as partial:
                partial.write_text(index, encoding="utf-8")
        except OSError as error:
            logger.warning("digests of files are not kept: %s cannot be written: %s", path, error)
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _state(file: Path) -> list[int]:
    """Return what tells whether a file has changed: its size, and when it was written, in nanoseconds."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _read(path: Path) -> dict[str, list[object]]:
    """Return the index: place of a file -> size, time, digest. One that cannot be read is empty."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = index.items() if isinstance(index, dict) else ()
    return {place: entry for place, entry in entries if isinstance(entry, list) and len(entry) == 3}
