"""Factor pairs in the graph: the down-projection that the members of a site share, and their up-projections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir
from onnxscript import OpBuilder

from rk_export.graph.modules.base import ExportModule, Pattern
from rk_export.graph.modules.projections import projection
from rk_export.passes.graph.nodes import DOWN, PART_KEY, UP, Mark
from rk_export.passes.graph.packing import Product, inner
from rk_export.passes.modules.factors import GroupedFactors, JointFactors


def _shared_downs(graph: ir.Graph) -> int:
    """Count down-projections that nothing but up-projections of the pair read."""
    downs = (node for node in graph if node.metadata_props.get(PART_KEY) == DOWN)
    return sum(
        all(use.node.metadata_props.get(PART_KEY, "").startswith(UP) for use in node.outputs[0].uses())
        for node in downs
    )


SHARED_DOWN = Pattern("shared down-projection", _shared_downs)


@dataclass
class _Pair:
    """One factor pair; its down-projection is emitted once for each input value."""

    name: str
    down: ExportModule
    ups: dict[str, ExportModule]
    emitted: dict[int, tuple[ir.Value, ir.Value]]

    def products_of(self, role: str, source: Hashable) -> tuple[Product, ...]:
        up = self.ups[role].products((source, self.name, DOWN))
        return inner(self.down.products(source)) + up

    def member(self, op: OpBuilder, role: str, x: ir.Value) -> ir.Value:
        if id(x) not in self.emitted:
            self.emitted[id(x)] = (x, self.down(op, x))
        y: ir.Value = self.ups[role](op, self.emitted[id(x)][1])
        return y


class FactorPairs(ExportModule):
    """The factor pairs that the members of a site share.

    Args:
        factors: The PyTorch factors.
        site: Name of the site; the pairs of a grouped site are numbered.
        accuracy_level: As in `QuantizedProjection`.
    """

    def __init__(self, factors: JointFactors | GroupedFactors, site: str, accuracy_level: int) -> None:
        super().__init__()
        self._pairs: list[_Pair] = []
        for number, pair in enumerate(factors.pairs()):
            name = site if isinstance(factors, JointFactors) else f"{site}.{number}"
            down = projection(pair.down, Mark(name, DOWN, pair.rank), accuracy_level)
            ups = {
                role: projection(up, Mark(name, UP + role, pair.rank), accuracy_level)
                for role, up in pair.ups.items()
            }
            for part, module in {DOWN: down, **{UP + role: up for role, up in ups.items()}}.items():
                setattr(self, f"{part}_{number}", module)
            self._pairs.append(_Pair(name, down, ups, {}))

    def emits(self) -> Counter[Pattern]:
        return Counter({SHARED_DOWN: len(self._pairs)})

    def products_of(self, role: str, source: Hashable) -> tuple[Product, ...]:
        """Return the products of a member; the down-projections are equal for members of one input."""
        products = tuple(product for pair in self._pairs for product in pair.products_of(role, source))
        return products if len(self._pairs) == 1 else inner(products)

    def member(self, op: OpBuilder, role: str, x: ir.Value) -> ir.Value:
        """Emit one member; the groups' outputs stand side by side."""
        parts = [pair.member(op, role, x) for pair in self._pairs]
        return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=-1)


class MembersSource(Protocol):
    """What the members of a site share."""

    def products_of(self, role: str, source: Hashable) -> tuple[Product, ...]:
        """Return the products of one member, those that it shares with others included."""
        ...

    def member(self, op: OpBuilder, role: str, x: ir.Value) -> ir.Value:
        """Emit one member."""
        ...


class Member(ExportModule):
    """Stands where a member's linear module stood."""

    def __init__(self, factors: MembersSource, role: str) -> None:
        super().__init__()
        self._factors, self._role = [factors], role

    def products(self, source: Hashable) -> tuple[Product, ...]:
        return self._factors[0].products_of(self._role, source)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self._factors[0].member(op, self._role, x)
