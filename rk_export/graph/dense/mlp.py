"""The MLP of a decoder layer: with a gate or without, and what may stand between its matrices."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from mobius.components import Linear, get_activation
from onnxscript import OpBuilder, nn

from rk_export.graph.dense.norms import norm_of
from rk_export.model.decoder_spec import DecoderSpec

# Constants of transformers' xIELU (arXiv 2411.13010); it does not read the ones that checkpoints store.
XIELU_BETA, XIELU_EPSILON = 0.5, -1e-6


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
    """xIELU (arXiv 2411.13010), an activation with two learned numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = nn.Parameter([1]), nn.Parameter([1])

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Return the activation of each value."""
        beta, epsilon, zero = (_like(op, number, x) for number in (XIELU_BETA, XIELU_EPSILON, 0.0))
        positive = op.Softplus(self.alpha_p)
        negative = op.Add(beta, op.Softplus(self.alpha_n))
        curve = op.Sub(op.Sub(op.Exp(op.Min(x, epsilon)), _like(op, 1.0, x)), x)
        bent = op.Where(op.Greater(x, zero), op.Mul(positive, op.Mul(x, x)), op.Mul(curve, negative))
        result: ir.Value = op.Add(bent, op.Mul(beta, x))
        return result


def _like(op: OpBuilder, number: float, value: ir.Value) -> ir.Value:
    """Return a number in the type of a value."""
    constant: ir.Value = op.CastLike(op.Constant(value=ir.tensor(np.array([number], np.float32))), value)
    return constant
