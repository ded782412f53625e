"""Statistics of a dense model on disk, a file for what is known of each layer from the way forward and the way back."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rk_export.report.humanize import size
from rk_export.scratch import mapped
from rk_export.tensor_cache import cache_file, read_tensors, write_tensors

logger = logging.getLogger(__name__)

CACHE_LIMIT = 2_000_000_000  # bytes; larger statistics are not kept after the run

Part = Literal["inputs", "gradients", "rest"]


class StatisticsParts:
    """What is known so far; tensors are mapped from their files.

    Args:
        key: All that the statistics depend on, JSON-ready.
        cache_dir: The cache; ``~/.cache/rk-export`` when None.
        folder: Takes statistics that are too large for the cache, for the time of a run; without one they have no
            name on disk.
    """

    def __init__(
        self, key: Mapping[str, Any], cache_dir: str | os.PathLike[str] | None, folder: Path | None
    ) -> None:
        self._key, self._cache_dir, self._folder = key, cache_dir, folder
        self._is_cached = True
        self.known: dict[str, Tensor] = {}

    def read(self, layers: int, *, with_gradients: bool) -> bool:
        """Read all parts of an earlier run; return whether they are complete."""
        parts: list[tuple[Part, int]] = [("rest", 0), *(("inputs", index) for index in range(layers))]
        if with_gradients:
            parts += [("gradients", index) for index in range(layers)]
        if not all(self.find(part, index) for part, index in parts):
            return False
        logger.info("read from %s", self._path("rest", 0, self._cache_dir).parent)
        return True

    def find(self, part: Part, index: int = 0) -> bool:
        """Read a part that lies on disk; return whether it does."""
        for folder in (self._cache_dir, *([self._folder] if self._folder else [])):
            if (found := read_tensors(self._path(part, index, folder))) is not None:
                self._is_cached = folder is self._cache_dir
                self.known |= found
                return True
        return False

    def add(self, part: Part, tensors: Mapping[str, Tensor], index: int = 0) -> None:
        """Keep a part."""
        found = None
        if self._is_cached or self._folder is not None:
            path = self._path(part, index, self._cache_dir if self._is_cached else self._folder)
            write_tensors(path, tensors)
            found = read_tensors(path, logging.DEBUG)
        if found is None:  # no space where such files lie, so perhaps beside the output
            found = mapped(tensors, self._folder if self._is_cached else None)
        self.known |= found

    def limit(self, needed: int) -> None:
        """Keep nothing in the cache where all parts together exceed its limit, and say so.

        Args:
            needed: Bytes of all parts.
        """
        self._is_cached = needed <= CACHE_LIMIT
        if not self._is_cached:
            logger.info("not cached: statistics of %s exceed %s", size(needed), size(CACHE_LIMIT))

    def _path(self, part: Part, index: int, folder: str | os.PathLike[str] | None) -> Path:
        return cache_file("dense-statistics", {**self._key, "part": [part, index]}, folder)
