"""Tensors that are costly to compute and depend on a model's weights alone, kept on disk by content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rk_export.atomic import atomic_file
from rk_export.cache_limit import is_entry, keep_within_limit, use

logger = logging.getLogger(__name__)

_titles: dict[str, str] = {}  # fingerprint of a model -> its name
_places = WeakIdKeyDictionary()  # tensor that is mapped from a file -> the file, and its name there
_models: dict[Path, str] = {}  # file of the cache -> name of the model that it belongs to

# Another place is a matter of the machine, like those of other caches.
CACHE = Path(os.environ.get("RK_EXPORT_CACHE") or "~/.cache/rk-export")


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache's folder; ``~/.cache/rk-export`` when None."""
    return Path(cache_dir) if cache_dir is not None else CACHE.expanduser()


def name_model(fingerprint: str, title: str) -> None:
    """Note what a model is called, so that what is cached for it can say so.

    Args:
        fingerprint: What keys know it by.
        title: Its name for people.
    """
    _titles[fingerprint] = title


def cache_file(kind: str, key: Mapping[str, Any], cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return where the tensors of a key lie; nothing is read or written.

    Args:
        kind: Folder inside the cache.
        key: All that the tensors depend on, JSON-ready.
        cache_dir: The cache; ``~/.cache/rk-export`` when None.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_root(cache_dir) / kind / f"{digest[:32]}.safetensors"
    for value in key.values():
        if isinstance(value, str) and value in _titles:
            _models[path] = _titles[value]
    return path


def text_key(tokens: Tensor) -> dict[str, Any]:
    """Return what a text (sequences, length) is known by in keys."""
    digest = hashlib.sha256(tokens.cpu().contiguous().numpy().data).hexdigest()
    return {"text": digest, "shape": list(tokens.shape)}


def read_tensors(path: Path, level: int = logging.INFO) -> dict[str, Tensor] | None:
    """Return the tensors of a cache file, mapped, or None where there is none; a broken one is logged and ignored.

    Args:
        path: The file.
        level: Of the line in the log that says that it was read.
    """
    if not path.is_file():
        return None
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        logger.warning("%s cannot be read and is made anew: %s", path, error)
        return None
    logger.log(level, "read from %s", path)
    use(path)
    for name, tensor in tensors.items():
        _places[tensor] = path, name
    return tensors


def place_of(tensor: Tensor) -> tuple[Path, str] | None:
    """Return the cache file that a tensor is mapped from and its name there; None where it lies in none any more."""
    place: tuple[Path, str] | None = _places.get(tensor)  # type: ignore[no-untyped-call]
    return place if place is not None and place[0].is_file() else None


def model_of(path: Path) -> str:
    """Return the name of the model that a cache file belongs to; empty where the file does not say."""
    try:
        with safe_open(path, "pt") as file:
            return str((file.metadata() or {}).get("model", ""))
    except (SafetensorError, OSError):
        return ""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a cache file in one step; where that is impossible the run goes on without, and says so.

    What was not used for the longest time goes where the cache is larger than its limit.
    """
    try:
        with atomic_file(path) as partial:
            whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(whole, partial, {"model": _models[path]} if path in _models else None)
    except (SafetensorError, OSError) as error:
        logger.warning("not cached: %s cannot be written: %s", path, error)
        return
    use(path)
    if is_entry(path):
        keep_within_limit(path.parents[1])


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
