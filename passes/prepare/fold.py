"""Norm gains moved into the matrices that read the norm: W (g ∘ n + b) = (W diag(g)) n + W b."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from rk_export.passes.prepare.parameters import read, set_parameter, weight
from rk_export.passes.prepare.wiring import Wiring


@torch.no_grad()
def fold_norm(norm: nn.Module, readers: Iterable[nn.Module], *, unit_offset: bool = False) -> None:
    """Fold the gain of a norm, and the shift of a LayerNorm, into everything that reads its output.

    Args:
        norm: RMSNorm or LayerNorm over d; its gain becomes 1 and its shift 0.
        readers: Modules with a weight (out, d); where the norm has a shift, with a bias (out,) too.
        unit_offset: The norm stores its gain minus one.
    """
    gain, shift = weight(norm) + float(unit_offset), read(norm, "bias")
    for reader in readers:
        matrix = weight(reader)
        if shift is not None:
            bias = read(reader, "bias")
            if bias is None:
                raise TypeError(f"{type(reader).__name__} has no bias to take the norm's shift")
            set_parameter(reader, "bias", bias + matrix.double() @ shift.double())
        set_parameter(reader, "weight", matrix * gain)
    set_parameter(norm, "weight", torch.full_like(gain, 1.0 - unit_offset))
    if shift is not None:
        set_parameter(norm, "bias", torch.zeros_like(shift))


def fold_layer(layer: nn.Module, wiring: Wiring, norms: Iterable[str]) -> None:
    """Fold norms in front of a layer's blocks, in place; `norms` are paths from `wiring.norms`."""
    for norm in norms:
        modules = [layer.get_submodule(path) for path in wiring.norms[norm]]
        fold_norm(layer.get_submodule(norm), modules, unit_offset=wiring.unit_offset)
