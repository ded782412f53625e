"""How a token chooses its experts in the graph: the routers of all families with mixtures."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from rk_export.errors import UnsupportedModelError
from rk_export.model.expert_spec import (
    SPARSE_MIXER_EXPERTS,
    CorrectedRouting,
    ExpertSpec,
    SoftmaxRouting,
    SparseMixerRouting,
)

Choice = tuple[ir.Value, ir.Value]


class _Router(nn.Module):
    """Scores every expert for every token.

    Args:
        experts: The mixture.
        hidden_size: Width of a token.
    """

    def __init__(self, experts: ExpertSpec, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter([experts.count, hidden_size])
        self._per_token, self._count = experts.per_token, experts.count

    def forward(self, op: OpBuilder, hidden: ir.Value) -> Choice:
        """Return weights and numbers (int64) of the chosen experts, both (..., experts of a token)."""
        raise NotImplementedError

    def _scores(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        scores: ir.Value = op.MatMul(hidden, op.Transpose(self.weight, perm=[1, 0]))
        return scores

    def _largest(self, op: OpBuilder, scores: ir.Value) -> Choice:
        values, chosen = op.TopK(scores, op.Constant(value_ints=[self._per_token]), axis=-1, _outputs=2)
        return values, chosen


class SoftmaxRouter(_Router):
    """See `SoftmaxRouting`."""

    def __init__(self, experts: ExpertSpec, hidden_size: int, routing: SoftmaxRouting) -> None:
        super().__init__(experts, hidden_size)
        self._normalized = routing.normalized

    def forward(self, op: OpBuilder, hidden: ir.Value) -> Choice:
        scores = self._scores(op, hidden)
        if self._normalized:
            values, chosen = self._largest(op, scores)
            return op.Softmax(values, axis=-1), chosen
        return self._largest(op, op.Softmax(scores, axis=-1))


class CorrectedRouter(_Router):
    """See `CorrectedRouting`."""

    def __init__(self, experts: ExpertSpec, hidden_size: int, routing: CorrectedRouting) -> None:
        super().__init__(experts, hidden_size)
        self.e_score_correction_bias = nn.Parameter([1, experts.count])
        self._smallest_sum = routing.smallest_sum

    def forward(self, op: OpBuilder, hidden: ir.Value) -> Choice:
        shares = op.Softmax(self._scores(op, hidden), axis=-1)
        _, chosen = self._largest(op, op.Add(shares, op.Squeeze(self.e_score_correction_bias, [0])))
        taken = op.GatherElements(shares, chosen, axis=-1)
        total = op.ReduceSum(taken, [-1], keepdims=True)
        return op.Div(taken, op.Max(total, op.CastLike(self._smallest_sum, total))), chosen


class SparseMixerRouter(_Router):
    """See `SparseMixerRouting`.

    Raises:
        UnsupportedModelError: A token runs through more or fewer than two experts.
    """

    def __init__(self, experts: ExpertSpec, hidden_size: int, routing: SparseMixerRouting) -> None:
        super().__init__(experts, hidden_size)
        if experts.per_token != SPARSE_MIXER_EXPERTS:
            raise UnsupportedModelError(
                f"SparseMixer chooses {SPARSE_MIXER_EXPERTS} experts, not {experts.per_token}",
                where="num_experts_per_tok",
            )
        self._tolerance = routing.tolerance

    def forward(self, op: OpBuilder, hidden: ir.Value) -> Choice:
        scores = self._scores(op, hidden)
        values, chosen = self._largest(op, scores)
        first, second = op.Split(values, [1, 1], axis=-1, _outputs=2)
        first_chosen, _ = op.Split(chosen, [1, 1], axis=-1, _outputs=2)
        numbers = op.Constant(value_ints=list(range(self._count)))
        is_first = op.Equal(first_chosen, numbers)
        weights = [self._weight(op, scores, first, None), self._weight(op, scores, second, is_first)]
        return op.Concat(*weights, axis=-1), chosen

    def _weight(self, op: OpBuilder, scores: ir.Value, best: ir.Value, taken: ir.Value | None) -> ir.Value:
        """Return the probability of the best expert (..., 1) among those that are close to it and not taken."""
        distance = op.Div(op.Sub(best, scores), op.Max(op.Abs(scores), best))
        left_out = op.Greater(distance, op.CastLike(self._tolerance, distance))
        if taken is not None:
            left_out = op.Or(left_out, taken)
        odds = op.Exp(op.Sub(scores, best))
        close = op.Where(left_out, op.CastLike(0.0, odds), odds)
        weight: ir.Value = op.Reciprocal(op.ReduceSum(close, [-1], keepdims=True))
        return weight


def router(experts: ExpertSpec, hidden_size: int) -> nn.Module:
    """Return the router of a mixture for tokens of width `hidden_size`."""
    routing = experts.routing
    if isinstance(routing, SparseMixerRouting):
        return SparseMixerRouter(experts, hidden_size, routing)
    if isinstance(routing, CorrectedRouting):
        return CorrectedRouter(experts, hidden_size, routing)
    return SoftmaxRouter(experts, hidden_size, routing)
