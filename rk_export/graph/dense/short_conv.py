"""Gated short convolutions: a layer mixes the last few tokens, channel by channel, instead of attending.

It is written in plain operators. ``com.microsoft.CausalConvWithState`` computes the same, but its CPU kernel is made of
scalar loops (16.7 ms for 512 tokens of 2,048 channels on one core, these operators 2.6 ms; 21 and 14 us for one token),
has no half precision, and hands on the state of the last column, which is padding where rows are padded on the right.
"""

from __future__ import annotations

import onnx_ir as ir
from mobius.components import Linear
from onnxscript import OpBuilder, nn

from rk_export.graph.dense.attention import Carried, RowTexts, Shared
from rk_export.graph.modules.base import ExportModule
from rk_export.model.decoder_spec import DecoderSpec


def row_texts(
    op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value, taps: int, dtype: ir.DataType
) -> RowTexts:
    """Read the mask: a first call may have padding, a later one has a token in each column; see `AttentionMask`."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    length, total = (op.Shape(value, start=1, end=2) for value in (input_ids, attention_mask))
    is_later = op.Not(op.Equal(total, length))
    own = op.Slice(attention_mask, op.Sub(total, length), total, [1])
    columns = op.Range(zero, op.Squeeze(length), one)
    last = op.ReduceMax(op.Mul(own, columns), [1], keepdims=1)
    end = op.Where(is_later, length, op.Add(last, [1]))
    held = op.Add(length, [taps])
    begin = op.Mul(op.Range(zero, op.Squeeze(op.Shape(attention_mask, start=0, end=1)), one), held)
    rows = op.Add(op.Unsqueeze(begin, [1]), end)

    def flags(where: ir.Value) -> ir.Value:
        found: ir.Value = op.Unsqueeze(op.Cast(op.Or(is_later, where), to=dtype), [2])
        return found

    return RowTexts(
        is_text=flags(op.Cast(own, to=ir.DataType.BOOL)),
        has_begun=flags(op.Greater(op.CumSum(own, one), zero)),
        last_rows=op.Add(rows, op.Constant(value_ints=list(range(taps)))),
    )


class ShortConv(ExportModule):
    """``out(c * conv(b * x))`` with b, c and x of one projection, and a convolution over the last tokens.

    The state holds ``b * x`` of the last tokens, as many as the convolution has taps, the newest last. That is one more
    than it needs: GenAI, transformers.js and the bundles made for them agree on this size.
    """

    def __init__(self, spec: DecoderSpec, *, has_bias: bool) -> None:
        super().__init__()
        width = spec.hidden_size
        self.in_proj = Linear(width, 3 * width, bias=has_bias)
        self.conv = Taps(width, spec.conv_taps, has_bias=has_bias)
        self.out_proj = Linear(width, width, bias=has_bias)
        self._width, self._has_bias = width, has_bias

    def forward(
        self, op: OpBuilder, hidden: ir.Value, shared: Shared, past: Carried
    ) -> tuple[ir.Value, Carried]:
        """Return the output (batch, length, width) and the state (batch, width, taps) after the last token."""
        (state,), texts = past, shared.texts
        if texts is None:
            raise TypeError("a short convolution reads the mask")
        if self._has_bias:  # transformers lets the bias stand where the mask hides a token between others
            hidden = op.Mul(hidden, texts.is_text)
        b, c, x = op.Split(self.in_proj(op, hidden), axis=-1, num_outputs=3, _outputs=3)
        gated = op.Mul(op.Mul(b, x), texts.has_begun if self._has_bias else texts.is_text)
        text = op.Concat(op.Transpose(state, perm=[0, 2, 1]), gated, axis=1)
        mixed = self.conv(op, text, gated)
        last = op.Gather(op.Reshape(text, [-1, self._width]), texts.last_rows, axis=0)
        return self.out_proj(op, op.Mul(c, mixed)), (op.Transpose(last, perm=[0, 2, 1]),)


class Taps(nn.Module):
    """A causal convolution of each channel by itself."""

    def __init__(self, width: int, taps: int, *, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter((width, 1, taps))
        self.bias = nn.Parameter((width,)) if has_bias else None
        self._taps = taps

    def forward(self, op: OpBuilder, text: ir.Value, newest: ir.Value) -> ir.Value:
        """Convolve the new tokens.

        Args:
            op: Builds the graph.
            text: (batch, taps + length, width), as many tokens before the new ones as there are taps.
            newest: (batch, length, width), the new tokens.
        """
        weights = op.Transpose(self.weight, perm=[2, 1, 0])
        parts = op.Split(weights, axis=0, num_outputs=self._taps, _outputs=self._taps)
        parts = parts if self._taps > 1 else [parts]
        mixed = op.Mul(newest, parts[-1])
        for distance, part in enumerate(reversed(parts[:-1]), start=1):
            before = op.Slice(text, [self._taps - distance], [-distance], [1])
            mixed = op.Add(mixed, op.Mul(before, part))
        biased: ir.Value = mixed if self.bias is None else op.Add(mixed, self.bias)
        return biased
