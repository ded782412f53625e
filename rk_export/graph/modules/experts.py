"""The experts of a mixture in one `com.microsoft.QMoE` node, which runs those alone that were chosen.

The node gets one row for each token and chosen expert, so that the graph itself weighs and adds up what the experts
return. Left to the node, the order of that sum would depend on the other tokens of the batch, and with it the last bit
of an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import cast

import onnx_ir as ir
import torch
from onnxscript import OpBuilder
from onnxscript import nn as onn
from torch import Tensor

from rk_export.graph.modules.base import Pattern, operators
from rk_export.graph.modules.bound import Bound
from rk_export.graph.modules.projections import UINT8, nbits_attributes
from rk_export.model.canonical import ExpertMLP, Experts
from rk_export.model.grouped_experts import needs_company
from rk_export.passes.graph.nodes import MICROSOFT, Mark, mark
from rk_export.passes.graph.packing import GROUPED_PRODUCT, MatrixFormat, Product
from rk_export.passes.modules.quantized import QuantizedLinear

GROUPED = operators("grouped experts", MICROSOFT, GROUPED_PRODUCT)
Part = Callable[[QuantizedLinear], Tensor]


class GroupedExperts(Bound):
    """Stands where the list of experts stood.

    Args:
        experts: Experts that one node computes exactly, see `why_not_grouped`.
        per_token: How many of them a token runs through.
        site: What the node belongs to.
        accuracy_level: As in `QuantizedProjection`.
        on_cpu: The graph is made for a CPU, where a row must be computed alike alone and in company.
    """

    def __init__(
        self, experts: Experts, per_token: int, site: Mark, accuracy_level: int, *, on_cpu: bool
    ) -> None:
        super().__init__()
        gates, ups, downs = _by_role(experts)
        spec, level = gates[0].spec, nbits_attributes(gates[0], accuracy_level)["accuracy_level"]
        self._site, self._count, self._per_token = site, len(gates), per_token
        self._copies = 2 if on_cpu and needs_company(spec, level) else 1
        self._hidden_size = gates[0].in_features
        self._attributes = {
            "k": 1,
            "normalize_routing_weights": 1,
            "expert_weight_bits": spec.bits,
            "block_size": spec.block_size,
            "accuracy_level": level,
            "weights_prepacked": 0,
            "swiglu_fusion": 1,
            "activation_type": "swiglu",
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }
        self.fc1_codes = self._stacked(_codes, (gates, ups), UINT8)
        self.fc1_scales = self._stacked(_scales, (gates, ups))
        self.fc2_codes = self._stacked(_codes, (downs,), UINT8)
        self.fc2_scales = self._stacked(_scales, (downs,))
        self.fc1_zero_points = self.fc2_zero_points = None
        if not spec.symmetric:
            self.fc1_zero_points = self._stacked(_zero_points, (gates, ups), UINT8)
            self.fc2_zero_points = self._stacked(_zero_points, (downs,), UINT8)

    def _stacked(
        self,
        part: Part,
        roles: Sequence[Sequence[QuantizedLinear]],
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> onn.Parameter:
        """Bind a part of all experts' matrices; the rows of gate and up take turns."""

        def stacked() -> Tensor:
            of_roles = [torch.stack([part(linear) for linear in linears]) for linears in roles]
            return torch.stack(of_roles, 2).flatten(1, 2)

        rows, columns = part(roles[0][0]).shape
        return self.bind((self._count, len(roles) * rows, columns), stacked, dtype)

    def emits(self) -> Counter[Pattern]:
        return Counter({GROUPED: 1})

    def products(self, source: Hashable) -> tuple[Product, ...]:
        """Return both stacks of matrices as products; they pack with no other."""
        types = tuple(value.dtype for value in (self.fc1_codes, self.fc1_scales))
        stored = MatrixFormat(GROUPED_PRODUCT, types)
        return tuple(
            Product((source, self._site.site, stack), self._site.site, stack, stored)
            for stack in ("fc1", "fc2")
        )

    def forward(self, op: OpBuilder, hidden: ir.Value, weights: ir.Value, chosen: ir.Value) -> ir.Value:
        """Return the weighted sum of the chosen experts; arguments as of `EveryExpert`."""
        computed = self._computed(op, *self._rows(op, hidden, chosen))
        parts = op.Reshape(computed, [-1, self._copies * self._per_token, self._hidden_size])
        if self._copies > 1:
            parts = op.Slice(parts, [0], [self._per_token], [1])
        mixed = op.MatMul(op.Reshape(weights, [-1, 1, self._per_token]), parts)
        total: ir.Value = op.Reshape(mixed, op.Shape(hidden))
        return total

    def _rows(self, op: OpBuilder, hidden: ir.Value, chosen: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return each token once for every expert that it chose, and 1 at that expert's place."""
        numbers = op.Constant(value_ints=list(range(self._count)))
        places = op.CastLike(op.Equal(op.Unsqueeze(chosen, [-1]), numbers), hidden)
        if self._copies > 1:
            places = op.Concat(*[places] * self._copies, axis=-2)
        tokens = op.Reshape(hidden, [-1, 1, self._hidden_size])
        tokens = op.Expand(tokens, [1, self._copies * self._per_token, 1])
        return op.Reshape(tokens, [-1, self._hidden_size]), op.Reshape(places, [-1, self._count])

    def _computed(self, op: OpBuilder, tokens: ir.Value, places: ir.Value) -> ir.Value:
        zero_points: tuple[ir.Value | None, ...] = ()
        if self.fc1_zero_points is not None:
            zero_points = (None, None, None, self.fc1_zero_points, self.fc2_zero_points)
        y: ir.Value = op.QMoE(
            tokens,
            places,
            self.fc1_codes,
            self.fc1_scales,
            None,
            self.fc2_codes,
            self.fc2_scales,
            None,
            *zero_points,
            _domain=MICROSOFT,
            **self._attributes,
        )
        # Shape inference knows no rule for the operator.
        y.type, y.shape = tokens.type, tokens.shape
        return mark(y, self._site)


def _by_role(experts: Experts) -> tuple[list[QuantizedLinear], ...]:
    """Return the gate, up and down matrices of all experts."""
    mlps = [cast(ExpertMLP, expert) for expert in experts]
    roles = ([mlp.gate_proj for mlp in mlps], [mlp.up_proj for mlp in mlps], [mlp.down_proj for mlp in mlps])
    return tuple(cast("list[QuantizedLinear]", linears) for linears in roles)


def _codes(linear: QuantizedLinear) -> Tensor:
    return linear.codes.flatten(1)


def _scales(linear: QuantizedLinear) -> Tensor:
    return linear.scales


def _zero_points(linear: QuantizedLinear) -> Tensor:
    assert linear.zero_points is not None  # the format is asymmetric
    return linear.zero_points
