"""What stored matrices weigh: the shapes that stand for a site, and their bytes in the exported file."""

from __future__ import annotations

from collections.abc import Sequence

from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.int8 import int8_bytes
from rk_export.passes.numerics.quantize import quantized_bytes
from rk_export.plan import SitePlan

Shape = tuple[int, int]  # (out, in)
Format = QuantSpec | None  # of a stored matrix; None: floats
FLOAT_BYTES = {"fp32": 4, "fp16": 2}


def stored_shapes(site: SitePlan, shapes: Sequence[Shape], kv_groups: int) -> list[Shape]:
    """Return the shapes of the matrices that stand for a site: its members, or its factors; sparse ones left out.

    Args:
        site: Form and rank.
        shapes: (out, in) of each member.
        kv_groups: Number of key-value heads, for sites with a factor pair each.
    """
    if site.form == "sparse" and not site.rank:
        return []
    if site.form == "dense":
        return list(shapes)
    columns, rows = shapes[0][1], sum(shape[0] for shape in shapes)
    pairs = kv_groups if site.form == "per_head" else 1
    others = rows - site.rank if site.form == "identity" else rows
    return [(pairs * site.rank, columns), (others, site.rank)]


def matrix_bytes(rows: int, columns: int, quant: Format, float_bytes: int) -> int:
    """Return the stored bytes of a (rows, columns) matrix, scales and zero points included."""
    if quant is None:
        return rows * columns * float_bytes
    if quant.activations == 8:
        return int8_bytes(rows, columns)
    return quantized_bytes(rows, columns, quant)
