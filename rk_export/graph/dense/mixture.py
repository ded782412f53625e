"""A mixture of experts in the dense graph: every expert computes every token, and what was not chosen weighs nothing.

Where the experts' stored form allows it, `GroupedExperts` takes the place of the list of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
from mobius.components import Linear
from onnxscript import OpBuilder, nn

from rk_export.graph.dense.mlp import Mlp
from rk_export.graph.dense.routers import router
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.expert_spec import ExpertSpec


class EveryExpert(nn.Module):
    """Experts that compute all tokens, whether chosen or not; each is a module by its number.

    Args:
        experts: The experts.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            setattr(self, str(number), expert)
        self._count = len(experts)

    def __getitem__(self, number: int) -> nn.Module:
        expert: nn.Module = getattr(self, str(number))
        return expert

    def forward(self, op: OpBuilder, hidden: ir.Value, weights: ir.Value, chosen: ir.Value) -> ir.Value:
        """Return the weighted sum of the chosen experts.

        Args:
            op: Builds the graph.
            hidden: (batch, length, hidden).
            weights: (batch, length, experts of a token).
            chosen: Their numbers, int64, of the same shape.
        """
        total: ir.Value | None = None
        for number in range(self._count):
            is_it = op.CastLike(op.Equal(chosen, op.Constant(value_int=number)), weights)
            share = op.ReduceSum(op.Mul(weights, is_it), [-1], keepdims=True)
            part = op.Mul(self[number](op, hidden), share)
            total = part if total is None else op.Add(total, part)
        assert total is not None  # a spec has experts
        return total


class Mixture(nn.Module):
    """Router, experts, and the MLP that all tokens run through where there is one.

    Args:
        spec: Of the decoder.
        experts: What the mixture computes.
    """

    def __init__(self, spec: DecoderSpec, experts: ExpertSpec) -> None:
        super().__init__()
        narrow = replace(spec, intermediate_size=experts.intermediate_size)
        self.gate = router(experts, spec.hidden_size)
        self.experts: nn.Module = EveryExpert([Mlp(narrow, has_bias=False) for _ in range(experts.count)])
        self.shared_expert = self.shared_expert_gate = None
        if experts.shared is not None:
            wide = replace(spec, intermediate_size=experts.shared.intermediate_size)
            self.shared_expert = Mlp(wide, has_bias=experts.shared.has_bias)
            if experts.shared.has_gate:
                self.shared_expert_gate = Linear(spec.hidden_size, 1, bias=False)

    def forward(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        weights, chosen = self.gate(op, hidden)
        mixed: ir.Value = self.experts(op, hidden, weights, chosen)
        if self.shared_expert is None:
            return mixed
        shared = self.shared_expert(op, hidden)
        if self.shared_expert_gate is not None:
            shared = op.Mul(op.Sigmoid(self.shared_expert_gate(op, hidden)), shared)
        total: ir.Value = op.Add(mixed, shared)
        return total
