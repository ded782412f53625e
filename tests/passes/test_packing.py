"""The packing rule without a graph: one value read, one format, and int8 only where attention takes all three."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rk_export.passes.graph.packing import INT8_PRODUCT, MatrixFormat, Product, packs, roles_of

FLOAT = MatrixFormat("MatMul", (ir.DataType.FLOAT,))
NBITS = MatrixFormat("MatMulNBits", (ir.DataType.UINT8, ir.DataType.FLOAT), (("K", 32), ("bits", 4)))
INT8 = MatrixFormat(INT8_PRODUCT, (ir.DataType.INT8, ir.DataType.FLOAT))


def products(parts: str, stored: MatrixFormat = FLOAT) -> list[Product]:
    return [Product("x", f"layers.0.{part}", part, stored) for part in parts.split()]


@pytest.mark.parametrize("stored", [FLOAT, NBITS])
@pytest.mark.parametrize("parts", ["q k v", "gate up", "q k"])
def test_products_on_one_input_in_one_format_become_one(stored: MatrixFormat, parts: str) -> None:
    (group,) = packs(products(parts, stored))
    assert roles_of(group) == tuple(parts.split())


@pytest.mark.parametrize(
    "change",
    [
        {"source": "y"},
        {"format": replace(NBITS, attributes=(("K", 32), ("bits", 8)))},
        {"format": replace(NBITS, has_bias=True)},
        {"format": replace(NBITS, types=(*NBITS.types, ir.DataType.UINT8))},
        {"format": FLOAT},
    ],
)
def test_another_input_or_format_is_packed_with_nothing(change: dict[str, object]) -> None:
    q, k = products("q k", NBITS)
    assert packs([q, replace(k, **change)]) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "found"),
    [("q k v", 1), ("factor_up_q factor_up_k factor_up_v", 1), ("q v k", 0), ("q k", 0), ("gate up", 0)],
)
def test_int8_products_become_one_where_attention_takes_all_three(parts: str, found: int) -> None:
    assert len(packs(products(parts, INT8))) == found


@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from([FLOAT, NBITS, INT8]), st.sampled_from("qkv")))
)
def test_every_product_is_in_at_most_one_group_and_the_order_stays(
    drawn: list[tuple[str, MatrixFormat, str]],
) -> None:
    listed = [
        Product(source, f"site.{number}", part, stored) for number, (source, stored, part) in enumerate(drawn)
    ]
    groups = packs(listed)
    packed = [product for group in groups for product in group]
    assert len(packed) == len(set(packed))
    for group in groups:
        assert len(group) > 1
        assert len({(product.source, product.format) for product in group}) == 1
        assert group == sorted(group, key=listed.index)
