"""Export modules whose parameters carry PyTorch tensors, bound to the traced graph as lazy tensors.

A weight is converted when it is written and never held twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import nn as onn
from torch import Tensor

from rk_export.graph.modules.base import ExportModule

_TORCH_TYPE = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT32: torch.int32,
}


class Bound(ExportModule):
    """A module whose parameters carry PyTorch tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[tuple[onn.Parameter, Callable[[], Tensor]]] = []

    def bind(
        self, shape: tuple[int, ...], tensor: Callable[[], Tensor], dtype: ir.DataType = ir.DataType.FLOAT
    ) -> onn.Parameter:
        """Return a parameter of a shape whose values `tensor` returns when they are written."""
        parameter = onn.Parameter(shape, dtype=dtype)
        self.sources.append((parameter, tensor))
        return parameter


def bind_weights(root: onn.Module) -> None:
    """Give every parameter under `root` its values, lazily."""
    for module in root.modules():
        for parameter, tensor in getattr(module, "sources", ()):
            parameter.const_value = lazy_tensor(parameter, tensor)


def lazy_tensor(parameter: ir.Value, tensor: Callable[[], Tensor]) -> ir.LazyTensor:
    """Return a tensor that is converted to the parameter's type when it is read."""
    dtype = parameter.dtype
    if dtype is None or parameter.shape is None:
        raise TypeError(f"{parameter.name} has no type")

    def evaluate() -> ir.TensorProtocol:
        array: Any = tensor().detach().cpu().to(_TORCH_TYPE[dtype]).contiguous().numpy()
        return ir.Tensor(array, dtype=dtype, name=parameter.name)

    return ir.LazyTensor(
        evaluate, dtype=dtype, shape=ir.Shape(parameter.shape), name=parameter.name, cache=False
    )
