"""Buckets of relative positions, as T5 has them and MPNet uses them (1910.10683)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

BUCKETS = 32  # MPNet computes with this number whatever its config says
FARTHEST = 128  # keys farther away share a bucket


def buckets() -> npt.NDArray[np.int64]:
    """Return the bucket of each distance of a key behind its query, from -`FARTHEST` to `FARTHEST`.

    They come from transformers: a logarithm computed elsewhere could fall to the other side of a whole number.
    """
    distances = torch.arange(-FARTHEST, FARTHEST + 1)
    found = MPNetEncoder.relative_position_bucket(distances, num_buckets=BUCKETS, max_distance=FARTHEST)
    return np.asarray(found.numpy(), np.int64)
