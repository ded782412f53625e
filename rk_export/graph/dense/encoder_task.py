"""Inputs and outputs of an encoder's graph."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from mobius import OPSET_VERSION, BaseModelConfig, ModelPackage, ModelTask
from onnxscript import GraphBuilder, nn

from rk_export.graph.dense.encoder import Encoder

_IR_VERSION = 11


class EncoderTask(ModelTask):
    """Token ids, mask and, where there are several types of tokens, their types; hidden states or logits."""

    model_roles: ClassVar[dict[str, str]] = {"model": "encoder"}

    def build(self, module: nn.Module, config: BaseModelConfig) -> ModelPackage:
        """Return the graph of an `Encoder`."""
        if not isinstance(module, Encoder):
            raise TypeError(f"{type(module).__name__} is no encoder")
        graph = ir.Graph(
            [], [], nodes=[], name="encoder", opset_imports={"": OPSET_VERSION, "com.microsoft": 1}
        )
        builder = GraphBuilder(graph)
        shape = [ir.SymbolicDim("batch"), ir.SymbolicDim("sequence_len")]
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if module.reads_types else [])]
        inputs = [builder.input(name, dtype=ir.DataType.INT64, shape=shape) for name in names]
        ids, mask, types = (*inputs, None)[:3]
        builder.add_output(module(builder.op, ids, mask, types), module.output)
        return ModelPackage({"model": ir.Model(graph, ir_version=_IR_VERSION)}, config=config)
