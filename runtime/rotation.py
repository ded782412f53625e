"""LongRoPE (arXiv:2402.13753) at run time: short sequences rotate by other frequencies than long ones.

The graph takes the frequencies of a run by the length of its mask. Two things would therefore go wrong silently, and
are refused here: keys in a cache that were rotated by the short factors, read by queries of a long sequence; and a
batch that rotates its short rows like the long one that they are padded to.
"""

from __future__ import annotations

import numpy as np

from rk_export.errors import InputError


def check_rotation(mask: np.ndarray, past: int, switch: int | None) -> None:
    """Refuse a run in which one rotation is not right for all rows, past positions included.

    Args:
        mask: [batch, past + new positions], 0 at padding.
        past: Positions in the cache.
        switch: Longest sequence that rotates by the short factors; None where one rotation serves all.

    Raises:
        InputError: The run needs both rotations.
    """
    length = mask.shape[1]
    if switch is None or length <= switch:
        return
    if 0 < past <= switch:
        raise InputError(
            f"LongRoPE rotates sequences of more than {switch} tokens by other factors, and the {past} cached "
            "positions have the short ones",
            where="past",
            fix=f"run all {length} tokens again without past",
        )
    shortest = int(mask.sum(axis=1).min())
    if shortest <= switch:
        raise InputError(
            f"rows of {shortest} and {length} tokens: LongRoPE rotates those of more than {switch} by other factors",
            where="batch",
            fix="run rows of the two kinds apart",
        )
