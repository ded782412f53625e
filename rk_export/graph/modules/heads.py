"""Reduced heads in the graph: zeros up to what attention expects, and the slice of what it returns.

GroupQueryAttention and the cache take heads of one size and a uniform number; the places of pruned heads and
dimensions are filled with zeros, which pass through attention as zeros.
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir
from onnxscript import OpBuilder
from torch import nn

from rk_export.graph.modules.base import ExportModule
from rk_export.passes.graph.packing import Product, inner
from rk_export.passes.modules.heads import HeadSlots, PaddedHeads, SlicedHeads


class PaddedProjection(ExportModule):
    """A projection, then zeros for the heads and dimensions that are not there.

    Args:
        projection: Gives (batch, length, heads * width).
        slots: Where its heads stand.
    """

    def __init__(self, projection: ExportModule, slots: HeadSlots) -> None:
        super().__init__()
        self.linear, self._slots = projection, slots

    def products(self, source: Hashable) -> tuple[Product, ...]:
        return inner(self.linear.products(source))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        slots, y = self._slots, self.linear(op, x)
        missing_heads, missing_width = slots.all_heads - slots.heads, slots.head_dim - slots.width
        if not missing_width:
            front: ir.Value = op.Pad(y, [0, 0, 0, 0, 0, missing_heads * slots.head_dim])
            return front
        heads = op.Reshape(y, [0, 0, slots.heads, slots.width])
        padded = op.Pad(heads, [0, 0, 0, 0, 0, 0, missing_heads, missing_width])
        joined: ir.Value = op.Reshape(padded, [0, 0, slots.all_heads * slots.head_dim])
        return joined


class SlicedProjection(ExportModule):
    """The heads and dimensions that are there, then a projection.

    Args:
        projection: Takes (batch, length, heads * width).
        slots: Where its heads stand.
    """

    def __init__(self, projection: ExportModule, slots: HeadSlots) -> None:
        super().__init__()
        self.linear, self._slots = projection, slots

    def products(self, source: Hashable) -> tuple[Product, ...]:
        return self.linear.products((source, "sliced"))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        slots = self._slots
        if slots.width == slots.head_dim:
            x = op.Slice(x, [0], [slots.heads * slots.width], [2])
        else:
            heads = op.Reshape(x, [0, 0, slots.all_heads, slots.head_dim])
            present = op.Slice(heads, [0, 0], [slots.heads, slots.width], [2, 3])
            x = op.Reshape(present, [0, 0, slots.heads * slots.width])
        y: ir.Value = self.linear(op, x)
        return y


def in_slots(module: nn.Module, projection: ExportModule) -> ExportModule:
    """Return a projection in the padding or slicing that its PyTorch module has, or as it is."""
    if isinstance(module, PaddedHeads):
        return PaddedProjection(projection, module.slots)
    if isinstance(module, SlicedHeads):
        return SlicedProjection(projection, module.slots)
    return projection
