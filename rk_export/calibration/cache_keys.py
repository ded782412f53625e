"""What is known of a model on a text, as a key of the cache."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from rk_export.source.protocol import Source
from rk_export.tensor_cache import text_key


def key_on_text(
    version: int,
    source: Source,
    tokens: Tensor,
    cache_dir: str | os.PathLike[str] | None,
    **more: object,
) -> dict[str, Any]:
    """Return the key of what a model shows on a text.

    Args:
        version: Of what computes it; raised when other numbers come out.
        source: The model, known by its files and the changes over them.
        tokens: Text, int64 (sequences, length).
        cache_dir: Where digests of files are kept; the cache's own place when None.
        more: Whatever else the numbers depend on, JSON-ready.
    """
    return {"version": version, "model": source.fingerprint(cache_dir), **text_key(tokens), **more}
