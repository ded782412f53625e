"""Copies between places of a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort


class Copier:
    """Copies between places of one device, which ONNX Runtime does only within a graph.

    Args:
        dtype: Of the values.
        device: ``cuda``, or ``cpu`` for tests.
    """

    def __init__(self, dtype: np.dtype[Any], device: str) -> None:
        self._type, self._device = dtype.type, device
        self._session = _identity(dtype, device)

    def copy(self, shape: Sequence[int], source: int, target: int) -> None:
        """Copy a value of three dimensions from one address to another."""
        binding = self._session.io_binding()
        binding.bind_input("x", self._device, 0, self._type, list(shape), source)
        binding.bind_output("y", self._device, 0, self._type, list(shape), target)
        self._session.run_with_iobinding(binding)

    def fetch(self, shape: Sequence[int], source: int) -> np.ndarray:
        """Return the value of three dimensions at an address."""
        binding = self._session.io_binding()
        binding.bind_input("x", self._device, 0, self._type, list(shape), source)
        binding.bind_output("y", "cpu")
        self._session.run_with_iobinding(binding)
        return np.array(binding.get_outputs()[0].numpy())

    def put(self, value: np.ndarray, target: int) -> None:
        """Write a value of three dimensions to an address."""
        binding = self._session.io_binding()
        held = np.ascontiguousarray(value)  # alive until the run ends
        binding.bind_cpu_input("x", held)
        binding.bind_output("y", self._device, 0, self._type, list(held.shape), target)
        self._session.run_with_iobinding(binding)


def _identity(dtype: np.dtype[Any], device: str) -> Any:
    """Return a session of a graph that copies its input, on the device."""
    from onnx import TensorProto, helper

    from rk_export.runtime.providers import CPU, CUDA

    kind = TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, kind, ["h", "p", "d"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "copy", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    providers = [CUDA, CPU] if device == "cuda" else [CPU]
    return ort.InferenceSession(model.SerializeToString(), providers=providers)
