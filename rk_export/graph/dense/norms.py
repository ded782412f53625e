"""The norms that models have, by the kind that their spec names."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from mobius.components import LayerNorm, LayerNormNoAffine, LayerNormNoBias, RMSNorm
from onnxscript import OpBuilder, nn

from rk_export.model.decoder_spec import DecoderSpec, NormKind
from rk_export.model.encoder_spec import EncoderSpec

Normed = DecoderSpec | EncoderSpec

_CLASSES: dict[NormKind, Callable[..., nn.Module]] = {
    "rms": RMSNorm,
    "layer": LayerNorm,
    "layer_no_bias": LayerNormNoBias,
    "layer_plain": LayerNormNoAffine,
}
# The kinds that the graph optimizations join with the sum in front of them: those with a gain.
JOINED_WITH_SUM: tuple[NormKind, ...] = ("rms", "layer", "layer_no_bias")


def norm_of(spec: Normed, width: int) -> nn.Module:
    """Return a norm of the family's kind over ``width`` coordinates."""
    return _CLASSES[spec.norm](width, eps=spec.norm_epsilon)


def query_key_norm(spec: Normed, heads: int) -> nn.Module:
    """Return the norm of queries or keys with a number of heads, for a spec that has one."""
    if spec.query_key_norm == "all":
        return norm_of(spec, heads * spec.heads.head_dim)
    if spec.query_key_norm == "head":
        return _ByHead(norm_of(spec, spec.heads.head_dim), spec.heads.head_dim)
    return _EachHead(spec, heads)


class _ByHead(nn.Module):
    """A norm over each head of (batch, length, heads * width), with one gain for all heads."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        # The parameters are this module's own, as in transformers; the norm itself is no child.
        self._normalize, self._width = norm.forward, width
        for name, parameter in norm.named_parameters():
            setattr(self, name, parameter)

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        heads = op.Reshape(states, [0, 0, -1, self._width])
        normed: ir.Value = op.Reshape(self._normalize(op, heads), [0, 0, -1])
        return normed


class _EachHead(nn.Module):
    """LayerNorm over each head of (batch, length, heads * width), with gains of its own and no shift."""

    def __init__(self, spec: Normed, heads: int) -> None:
        super().__init__()
        self._width = spec.heads.head_dim
        self._norm = LayerNormNoAffine(self._width, eps=spec.norm_epsilon)
        self.weight = nn.Parameter([heads, self._width])

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        normed = self._norm(op, op.Reshape(states, [0, 0, -1, self._width]))
        scaled: ir.Value = op.Reshape(op.Mul(normed, self.weight), [0, 0, -1])
        return scaled
