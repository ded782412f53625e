"""A LongRoPE model that changes its rotary factors within a short text, and prompts for it."""

from __future__ import annotations

from typing import Any

import numpy as np

# The length at which the factors change, and the longest text.
SWITCH, CONTEXT = 40, 128
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [3.0 + 2.5 * i for i in range(8)],
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": SWITCH,
}
FIELDS = {
    "rope_parameters": LONGROPE,
    "original_max_position_embeddings": SWITCH,
    "max_position_embeddings": CONTEXT,
}


def prompt(length: int, seed: int = 0) -> list[int]:
    """Return random token ids of the tiny models' vocabulary; none is a special token."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, 160, length)]
