"""Ascending places as one-byte distances: what a sparse matrix is stored as."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 255


def encode_gaps(places: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return each place's distance from the one before, the first from 0, and the values at them.

    A distance beyond 255 takes steps of 255 to entries that are zero.

    Args:
        places: Strictly ascending, integers (n,).
        values: (n,).

    Returns:
        Distances uint8 (m,) and values (m,), m >= n; the running sum of the distances gives strictly ascending
        places.
    """
    places = places.long()
    distances = torch.diff(places, prepend=places.new_zeros(1))
    # A distance of 255 is itself a step: ceil(d / 255) entries for d > 0, one for a first place of 0.
    counts = ((distances + _LARGEST - 1) // _LARGEST).clamp_min(1)
    ends = counts.cumsum(0) - 1
    total = int(counts.sum())
    gaps = torch.full((total,), _LARGEST, dtype=torch.uint8, device=places.device)
    gaps[ends] = (distances - (counts - 1) * _LARGEST).to(torch.uint8)
    padded = values.new_zeros(total)
    padded[ends] = values
    return gaps, padded
