"""What the passes that shrink a layer share: some rows of a linear module, parameter counts, the finding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from rk_export.passes.base import Layer
from rk_export.passes.modules.quantized import linear_of
from rk_export.report.records import Finding, Outcome


def rows_of(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    """Return a linear module with some of the output rows, copied."""
    kept = rows.to(linear.weight.device)
    return linear_of(linear.weight[kept], None if linear.bias is None else linear.bias[kept])


def empty_linear(columns: int, rows: int, *, bias: bool) -> nn.Linear:
    """Return a linear module of a shape on the meta device."""
    return nn.Linear(columns, rows, bias=bias, device="meta")


def weight_bytes(linears: Iterable[nn.Linear]) -> int:
    """Return the bytes of weights, biases left out."""
    return sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)


def shape_finding(layer: Layer, name: str, removed: int, error: float | None, **details: Any) -> Finding:
    """Return the finding of a pass that shrank a layer.

    Its target is what went: it weighed `removed` bytes and weighs nothing now. What stays is counted at the
    sites, so that the bytes of all findings still add up to the model's.

    Args:
        layer: The layer.
        name: Of the dimension, as in `LayerShape`.
        removed: Bytes of weights that went.
        error: Relative error of the output of the layer's last matrix, or None where it was not computed.
        details: Further details.
    """
    return Finding(
        target=f"layers.{layer.index}.{name}",
        outcome=Outcome.APPLIED,
        bytes_before=removed,
        error=error,
        details={"pass": name, **details},
    )
