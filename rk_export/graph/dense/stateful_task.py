"""Inputs and outputs of a decoder in which some layers carry a state instead of keys and values."""

from __future__ import annotations

import onnx_ir as ir
from mobius import ArchitectureConfig, ModelPackage
from mobius.tasks import ModelTask
from mobius.tasks._base import _make_graph, _make_model
from onnxscript import GraphBuilder, nn

from rk_export.model.decoder_spec import DecoderSpec

Carried = tuple[ir.Value, ...]
_SIDES = ("key", "value")


class StatefulTextGeneration(ModelTask):
    """As mobius' own task for text, with ``past_conv.N`` and ``present_conv.N`` for layers with a short convolution.

    Layers keep their numbers, so those of keys and values have gaps.

    Args:
        spec: Of the decoder.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        self._spec = spec

    def build(self, module: nn.Module, config: ArchitectureConfig) -> ModelPackage:
        graph, builder = _make_graph()
        batch, length = ir.SymbolicDim("batch"), ir.SymbolicDim("sequence_len")
        names = ("input_ids", "attention_mask", "position_ids")
        shapes = ([batch, length], [batch, "past_seq_len + seq_len"], [batch, length])
        ids, mask, positions = (
            builder.input(name, dtype=ir.DataType.INT64, shape=shape)
            for name, shape in zip(names, shapes, strict=True)
        )
        past = [self._past(builder, index, batch, config.dtype) for index in range(len(self._spec.layers))]
        logits, present = module(
            builder.op, input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past
        )
        builder.add_output(logits, "logits")
        for index, values in enumerate(present):
            self._add_present(builder, index, values, batch, config.dtype)
        return ModelPackage({"model": _make_model(graph)}, config=config)

    def _shape(self, index: int, batch: ir.SymbolicDim, length: str) -> list[ir.SymbolicDim | str | int]:
        heads = self._spec.heads
        if self._spec.layers[index].mixer == "attention":
            return [batch, heads.kv_heads, length, heads.head_dim]
        return [batch, self._spec.hidden_size, self._spec.conv_taps]

    def _names(self, index: int, cache: str, state: str) -> tuple[str, ...]:
        if self._spec.layers[index].mixer == "attention":
            return tuple(f"{cache}.{index}.{side}" for side in _SIDES)
        return (f"{state}.{index}",)

    def _past(self, builder: GraphBuilder, index: int, batch: ir.SymbolicDim, dtype: ir.DataType) -> Carried:
        shape = self._shape(index, batch, "past_sequence_len")
        return tuple(
            builder.input(name, dtype=dtype, shape=shape)
            for name in self._names(index, "past_key_values", "past_conv")
        )

    def _add_present(
        self, builder: GraphBuilder, index: int, values: Carried, batch: ir.SymbolicDim, dtype: ir.DataType
    ) -> None:
        shape = self._shape(index, batch, "past_sequence_len + sequence_len")
        for name, value in zip(self._names(index, "present", "present_conv"), values, strict=True):
            value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)
            builder.add_output(value, name)
