"""Which products with stored matrices one product should stand for; nothing here knows of a graph.

The exporter asks before there is a graph, from what its modules declare; the pass `PackedProjections` asks about the
nodes that it finds. Both get the answer from `packs`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import onnx_ir as ir

from rk_export.passes.graph.nodes import UP

INT8_PRODUCT = "DynamicQuantizeMatMul"
GROUPED_PRODUCT = "QMoE"
ATTENTION_ROLES = ("q", "k", "v")
_MLP_SITES = {"gate", "up", "gate_up"}


@dataclass(frozen=True)
class MatrixFormat:
    """How a product stores its matrix: matrices of one format can be stacked.

    Args:
        operator: Type of the operator.
        types: Types of the stored tensors, e.g. codes and scales.
        attributes: Name and value of the operator's attributes, without the number of rows.
        has_bias: Whether a bias is added.
    """

    operator: str
    types: tuple[ir.DataType | None, ...]
    attributes: tuple[tuple[str, object], ...] = ()
    has_bias: bool = False

    @property
    def is_int8(self) -> bool:
        """Whether the product rounds its inputs to int8."""
        return self.operator == INT8_PRODUCT


class ProductLike(Protocol):
    """What the rule asks of a product: what it reads, how its matrix is stored, and what it computes."""

    @property
    def source(self) -> Hashable: ...
    @property
    def format(self) -> MatrixFormat: ...
    @property
    def role(self) -> str: ...
    @property
    def site(self) -> str: ...


@dataclass(frozen=True)
class Product:
    """A product that a module will put into the graph.

    Args:
        source: What it reads; equal for products that read one value.
        site: Name of the site that its matrix belongs to.
        part: Its part in the site, as in `Mark`.
        format: How its matrix is stored.
        is_whole: Whether its output, with the bias, is all that the module returns.
    """

    source: Hashable
    site: str
    part: str
    format: MatrixFormat
    is_whole: bool = True

    @property
    def role(self) -> str:
        """What the product computes."""
        return role_of(self.part)


def inner(products: Iterable[Product]) -> tuple[Product, ...]:
    """Return the products of a child whose output is not yet what its parent returns."""
    return tuple(replace(product, is_whole=False) for product in products)


ProductT = TypeVar("ProductT", bound=ProductLike)


def packs(products: Iterable[ProductT]) -> list[list[ProductT]]:
    """Return the sets of products, at least two each, that one product should stand for, in their order.

    They read one value and store their matrices in one format. What attention reads stays apart from what the MLP reads
    where both read one norm. Int8 products are made for long inputs, where copying
    the parts out of a packed product costs more than starting more kernels (2 % of a 512-token prefill of
    SmolLM2-135M); attention takes q, k and v without a copy.
    """
    readers: dict[tuple[Hashable, MatrixFormat, bool], list[ProductT]] = {}
    for product in products:
        key = (product.source, product.format, _is_of_mlp(product.site))
        readers.setdefault(key, []).append(product)
    return [group for group in readers.values() if len(group) > 1 and _is_worth_it(group)]


def _is_of_mlp(site: str) -> bool:
    """Whether a product, or one that stands for several, belongs to the gate and the up-projection of an MLP."""
    return {name.rpartition(".")[2] for name in site.split("+")} <= _MLP_SITES


def _is_worth_it(group: list[ProductT]) -> bool:
    return not group[0].format.is_int8 or roles_of(group) == ATTENTION_ROLES


def roles_of(products: Iterable[ProductLike]) -> tuple[str, ...]:
    """Return what products compute, in their order."""
    return tuple(product.role for product in products)


def role_of(part: str) -> str:
    """Return what a part of a site computes: an up-projection computes what its member does."""
    return part.removeprefix(UP)
