"""The residual stream rotated by one orthogonal matrix (QuaRot, 2404.00456; SliceGPT, 2401.15024).

With h' = Qᵀ h in place of h, an RMSNorm without gain commutes with the rotation, every matrix that reads the
stream becomes W Q and every matrix that writes to it Qᵀ W.
"""

from __future__ import annotations

import torch
from torch import nn

from rk_export.passes.modules.quantized import RotatedHead
from rk_export.passes.prepare.orthogonal import Orthogonal
from rk_export.passes.prepare.parameters import read, set_parameter, weight
from rk_export.passes.prepare.wiring import Wiring


@torch.no_grad()
def rotate_reader(module: nn.Module, rotation: Orthogonal) -> None:
    """Let a matrix (out, d), or an embedding table (vocabulary, d), work on the rotated stream: W Q."""
    set_parameter(module, "weight", rotation.right(weight(module)))


@torch.no_grad()
def rotate_writer(module: nn.Module, rotation: Orthogonal) -> None:
    """Let a matrix (d, in) write into the rotated stream: Qᵀ W and Qᵀ b."""
    set_parameter(module, "weight", rotation.left(weight(module)))
    bias = read(module, "bias")
    if bias is not None:
        set_parameter(module, "bias", rotation.right(bias[None])[0])


def rotate_layer(layer: nn.Module, wiring: Wiring, rotation: Orthogonal) -> None:
    """Rotate everything in a layer that reads or writes the stream, in place; its gains are folded already."""
    for path in wiring.readers:
        rotate_reader(layer.get_submodule(path), rotation)
    for path in wiring.writers:
        rotate_writer(layer.get_submodule(path), rotation)


@torch.no_grad()
def rotated_tied_head(
    norm: nn.Module, embedding: nn.Embedding, rotation: Orthogonal, *, unit_offset: bool = False
) -> RotatedHead:
    """Return the head of a rotated model whose output projection is its embedding.

    With the table E' = E Q, logits = E diag(g) n = E' (Qᵀ diag(g) Q) n', where g is the final gain and n' the
    final norm's output without it.

    Args:
        norm: The final RMSNorm; its gain moves into the head and becomes 1.
        embedding: The table, rotated already; the head shares its parameter.
        rotation: Q.
        unit_offset: The norm stores its gain minus one.
    """
    gain = weight(norm) + float(unit_offset)
    size = len(gain)
    matrix = rotation.left(gain.double()[:, None] * rotation.matrix().to(gain.device))
    set_parameter(norm, "weight", torch.full_like(gain, 1.0 - unit_offset))
    middle = nn.Linear(size, size, bias=False, device="meta")
    middle.weight = nn.Parameter(matrix.to(embedding.weight.dtype).contiguous(), requires_grad=False)
    head = nn.Linear(size, embedding.num_embeddings, bias=False, device="meta")
    head.weight = embedding.weight
    return RotatedHead(middle, head)
