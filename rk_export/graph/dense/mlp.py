"""The MLP of a decoder layer: with a gate or without, and what may stand between its matrices."""

from __future__ import annotations

import onnx_ir as ir
from mobius.components import Linear, get_activation
from onnxscript import OpBuilder, nn

from rk_export.graph.dense.norms import norm_of
from rk_export.model.decoder_spec import DecoderSpec


class Mlp(nn.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``; a norm may stand before ``down``.

    Args:
        spec: Of the decoder.
        has_bias: Whether the matrices have biases.
    """

    def __init__(self, spec: DecoderSpec, *, has_bias: bool) -> None:
        super().__init__()
        hidden, width = spec.hidden_size, spec.intermediate_size
        self.gate_proj = Linear(hidden, width, bias=has_bias) if spec.gated_mlp else None
        self.up_proj = Linear(hidden, width, bias=has_bias)
        self.down_proj = Linear(width, hidden, bias=has_bias)
        self.act_fn = Xielu() if spec.activation == "xielu" else get_activation(spec.activation)
        self.ffn_sub_norm = norm_of(spec, width) if spec.sub_norms else None

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Map (batch, length, hidden) to the same shape."""
        if self.gate_proj is None:
            inner = self.act_fn(op, self.up_proj(op, x))
        else:
            inner = op.Mul(self.act_fn(op, self.gate_proj(op, x)), self.up_proj(op, x))
        if self.ffn_sub_norm is not None:
            inner = self.ffn_sub_norm(op, inner)
        result: ir.Value = self.down_proj(op, inner)
        return result


class Xielu(nn.Module):
    """xIELU (arXiv 2411.13010), an activation with two learned numbers and two constants that checkpoints store."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = nn.Parameter([1]), nn.Parameter([1])
        self.beta, self.eps = nn.Parameter([]), nn.Parameter([])

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Return the activation of each value; in float32, where the difference of close numbers keeps digits."""
        wide = op.Cast(x, to=ir.DataType.FLOAT)
        alpha_p, alpha_n, beta, eps = (
            op.Cast(number, to=ir.DataType.FLOAT)
            for number in (self.alpha_p, self.alpha_n, self.beta, self.eps)
        )
        above = op.Mul(op.Softplus(alpha_p), op.Mul(wide, wide))
        curve = op.Sub(op.Sub(op.Exp(op.Min(wide, eps)), op.Constant(value_float=1.0)), wide)
        below = op.Mul(curve, op.Add(beta, op.Softplus(alpha_n)))
        bent = op.Where(op.Greater(wide, op.Constant(value_float=0.0)), above, below)
        result: ir.Value = op.CastLike(op.Add(bent, op.Mul(beta, wide)), x)
        return result
