"""Values rotated inside each KV head, undone in the output projection (QuaRot, 2404.00456).

Attention mixes the values of a head over tokens and never over its coordinates, so Rᵀ on the rows of V and R on
the matching columns of O cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rk_export.passes.prepare.orthogonal import Orthogonal
from rk_export.passes.prepare.parameters import read, set_parameter, weight
from rk_export.passes.prepare.wiring import Wiring


@torch.no_grad()
def rotate_values(value: nn.Module, output: nn.Module, rotations: Sequence[Orthogonal]) -> None:
    """Rotate V and O inside the heads, in place.

    Args:
        value: V, weight (KV heads * head dimension, d), bias or none.
        output: O, weight (d, heads * head dimension); consecutive heads share a KV head.
        rotations: R of each KV head.
    """
    count = len(rotations)
    matrix, bias = weight(value), read(value, "bias")
    parts = zip(rotations, matrix.chunk(count), strict=True)
    set_parameter(value, "weight", torch.cat([rotation.left(part) for rotation, part in parts]))
    if bias is not None:
        shifts = zip(rotations, bias.view(count, 1, -1), strict=True)
        set_parameter(value, "bias", torch.cat([rotation.right(part)[0] for rotation, part in shifts]))
    mixed = weight(output)
    head_dim = len(matrix) // count
    columns = zip(rotations, mixed.chunk(count, dim=1), strict=True)
    turned = [rotation.right(part.reshape(-1, head_dim)).view(len(mixed), -1) for rotation, part in columns]
    set_parameter(output, "weight", torch.cat(turned, dim=1))


def rotate_heads(layer: nn.Module, wiring: Wiring, rotations: Sequence[Orthogonal]) -> None:
    """Rotate a layer's values inside their heads, in place; a layer without attention has none."""
    if wiring.value is None or wiring.output is None:
        return
    value, output = (layer.get_submodule(path) for path in (wiring.value, wiring.output))
    rotate_values(value, output, rotations)
