"""Tensors that are costly to compute and depend on a model's weights alone, kept on disk by content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rk_export.atomic import atomic_file

logger = logging.getLogger(__name__)

# Another place is a matter of the machine, like those of other caches.
CACHE = Path(os.environ.get("RK_EXPORT_CACHE") or "~/.cache/rk-export")


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache's folder; ``~/.cache/rk-export`` when None."""
    return Path(cache_dir) if cache_dir is not None else CACHE.expanduser()


def cache_file(kind: str, key: Mapping[str, Any], cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return where the tensors of a key lie; nothing is read or written.

    Args:
        kind: Folder inside the cache.
        key: All that the tensors depend on, JSON-ready.
        cache_dir: The cache; ``~/.cache/rk-export`` when None.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_root(cache_dir) / kind / f"{digest[:32]}.safetensors"


def text_key(tokens: Tensor) -> dict[str, Any]:
    """Return what a text (sequences, length) is known by in keys."""
    digest = hashlib.sha256(tokens.cpu().contiguous().numpy().data).hexdigest()
    return {"text": digest, "shape": list(tokens.shape)}


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a cache file, or None where there is none; a broken one is logged and ignored."""
    if not path.is_file():
        return None
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        logger.warning("%s cannot be read and is made anew: %s", path, error)
        return None
    logger.info("read from %s", path)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a cache file in one step; where that is impossible the run goes on without, and says so."""
    try:
        with atomic_file(path) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
    except (SafetensorError, OSError) as error:
        logger.warning("not cached: %s cannot be written: %s", path, error)


def cached(
    kind: str,
    key: Mapping[str, Any],
    make: Callable[[], Mapping[str, Tensor]],
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    keep: bool = True,
) -> Mapping[str, Tensor]:
    """Return the tensors of a key: those of an earlier run, or made now and kept.

    Args:
        kind: Folder inside the cache.
        key: All that the tensors depend on, JSON-ready.
        make: Computes them.
        cache_dir: The cache; ``~/.cache/rk-export`` when None.
        keep: Write what was made.
    """
    path = cache_file(kind, key, cache_dir)
    if (known := read_tensors(path)) is not None:
        return known
    made = make()
    if keep:
        write_tensors(path, made)
    return made


def as_tensors(items: Mapping[str, object], fields: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors that are fields of named objects, each by name and field."""
    return {f"{name}|{field}": getattr(item, field) for name, item in items.items() for field in fields}


def from_tensors(tensors: Mapping[str, Tensor], name: str, fields: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the fields of one of the objects that `as_tensors` took apart."""
    return tuple(tensors[f"{name}|{field}"] for field in fields)
