"""The identity form in the graph: z = D x, then z and C z put together in the members' order (2501.19090).

A member that is a few stretches of [z; C z], as renumbered neurons are, takes a Split and a Concat. Any other
order takes a Gather between two Transpose nodes: the runtime's Gather copies one element at a time along the last
axis, but whole rows along an inner one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

import onnx_ir as ir
from onnxscript import OpBuilder
from torch import Tensor

from rk_export.graph.modules.base import ExportModule, Pattern
from rk_export.graph.modules.bound import Bound
from rk_export.graph.modules.factors import SHARED_DOWN
from rk_export.graph.modules.projections import projection
from rk_export.passes.graph.nodes import DOWN, UP, Mark, mark
from rk_export.passes.graph.packing import Product, inner
from rk_export.passes.modules.factors import IdentityFactors

# A member of more stretches is gathered.
MAX_RUNS = 4

Run = tuple[int, int]


@dataclass
class _Emitted:
    """What stands in the graph for one input: z, C z, and what was cut or joined from them so far."""

    x: ir.Value
    z: ir.Value
    rest: ir.Value
    pieces: dict[Run, ir.Value] = field(default_factory=dict)
    rows: ir.Value | None = None


class GatheredRows(Bound):
    """The outputs of a member, gathered from the rows (batch, Σout, length) of the transposed [z; C z].

    Args:
        order: Where each output stands, int32 (out,).
    """

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order = self.bind(tuple(order.shape), lambda: order, ir.DataType.INT32)

    def forward(self, op: OpBuilder, rows: ir.Value) -> ir.Value:
        y: ir.Value = op.Transpose(op.Gather(rows, self.order, axis=1), perm=[0, 2, 1])
        return y


class Bias(Bound):
    """y + b.

    Args:
        bias: (out,).
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = self.bind(tuple(bias.shape), lambda: bias)

    def forward(self, op: OpBuilder, y: ir.Value) -> ir.Value:
        total: ir.Value = op.Add(y, self.bias)
        return total


class PivotFactors(ExportModule):
    """The identity form that the members of a site share.

    Args:
        factors: The PyTorch factors.
        site: Name of the site.
        accuracy_level: As in `QuantizedProjection`.
    """

    def __init__(self, factors: IdentityFactors, site: str, accuracy_level: int) -> None:
        super().__init__()
        rank = factors.rank
        self._mark = Mark(site, UP + "order", rank)
        self.down = projection(factors.down, Mark(site, DOWN, rank), accuracy_level)
        self.rest = projection(factors.ups["rest"], Mark(site, UP + "rest", rank), accuracy_level)
        self._rank, self._width = rank, sum(len(factors.order(role)) for role in factors.roles)
        runs = {role: factors.runs(role) for role in factors.roles}
        self._runs = {role: found for role, found in runs.items() if len(found) <= MAX_RUNS}
        for role in factors.roles:
            if role not in self._runs:
                setattr(self, f"order_{role}", GatheredRows(factors.order(role)))
            if (bias := factors.bias(role)) is not None:
                setattr(self, f"bias_{role}", Bias(bias))
        self._emitted: dict[int, _Emitted] = {}

    def emits(self) -> Counter[Pattern]:
        return Counter({SHARED_DOWN: 1})

    def products_of(self, role: str, source: Hashable) -> tuple[Product, ...]:
        """Return the products of a member: every member reads both."""
        del role
        behind_down = (source, self._mark.site, DOWN)
        return inner((*self.down.products(source), *self.rest.products(behind_down)))

    def member(self, op: OpBuilder, role: str, x: ir.Value) -> ir.Value:
        """Emit one member; what the members share is emitted once for each input value."""
        if id(x) not in self._emitted:
            self._emitted[id(x)] = self._emit(op, x)
        parts = self._emitted[id(x)]
        y = self._concatenated(op, role, parts) if role in self._runs else self._gathered(op, role, parts)
        bias = getattr(self, f"bias_{role}", None)
        return y if bias is None else bias(op, y)

    def _emit(self, op: OpBuilder, x: ir.Value) -> _Emitted:
        z = self.down(op, x)
        parts = _Emitted(x, z, self.rest(op, z))
        self._cut(op, parts, parts.z, (0, self._rank))
        self._cut(op, parts, parts.rest, (self._rank, self._width))
        return parts

    def _cut(self, op: OpBuilder, parts: _Emitted, value: ir.Value, whole: Run) -> None:
        """Split z or C z wherever a stretch begins or ends."""
        start, end = whole
        bounds = {bound for runs in self._runs.values() for run in runs for bound in run}
        cuts = [start, *sorted(bound for bound in bounds if start < bound < end), end]
        pieces = list(itertools.pairwise(cuts))
        if len(pieces) == 1:
            parts.pieces[whole] = value
            return
        sizes = [stop - first for first, stop in pieces]
        outputs = op.Split(value, sizes, axis=-1, _outputs=len(pieces))
        mark(outputs[0], self._mark)
        parts.pieces.update(zip(pieces, outputs, strict=True))

    def _concatenated(self, op: OpBuilder, role: str, parts: _Emitted) -> ir.Value:
        wanted = [
            value
            for start, end in self._runs[role]
            for (first, last), value in sorted(parts.pieces.items())
            if start <= first and last <= end
        ]
        return wanted[0] if len(wanted) == 1 else mark(op.Concat(*wanted, axis=-1), self._mark)

    def _gathered(self, op: OpBuilder, role: str, parts: _Emitted) -> ir.Value:
        if parts.rows is None:
            joined = mark(op.Concat(parts.z, parts.rest, axis=-1), self._mark)
            parts.rows = op.Transpose(joined, perm=[0, 2, 1])
        y: ir.Value = getattr(self, f"order_{role}")(op, parts.rows)
        return y
