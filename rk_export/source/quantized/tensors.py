"""Quantized checkpoints as float ones: each matrix is dequantized exactly to float32 when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PretrainedConfig

from rk_export.errors import InputError
from rk_export.passes.numerics.grid import Grid
from rk_export.report.records import Finding, Outcome
from rk_export.runtime.bundle_files import read_json
from rk_export.source.quantized.awq import read_awq
from rk_export.source.quantized.bitnet import read_bitnet
from rk_export.source.quantized.bitsandbytes import read_bitsandbytes
from rk_export.source.quantized.compressed_tensors import read_compressed
from rk_export.source.quantized.fp8 import read_fp8
from rk_export.source.quantized.gptq import read_gptq
from rk_export.source.quantized.matrix import INCOMPLETE, Quantized
from rk_export.source.tensor_files import StoredTensors


class _Reader(Protocol):
    def __call__(
        self, tensors: StoredTensors, config: Mapping[str, Any], *, transposed: bool
    ) -> Quantized: ...


_READERS: dict[str, _Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "bitnet": read_bitnet,
    "bitsandbytes": read_bitsandbytes,
}
# Where AutoGPTQ and AutoAWQ wrote what transformers later moved into config.json.
OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# Families whose linear modules are Conv1D and hold (in, out).
_TRANSPOSED = frozenset({"gpt2"})
_LEAVES = frozenset(
    {
        "qweight",
        "qzeros",
        "g_idx",
        "weight_packed",
        "weight_scale",
        "weight_scale_inv",
        "weight_zero_point",
        "SCB",
    }
    | {"absmax", "nested_absmax", "quant_map", "nested_quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4"}
)


class DequantizedTensors:
    """The tensors of a quantized checkpoint, in floats: a matrix is one tensor instead of its parts.

    Args:
        stored: The tensors as they are stored.
        quantized: What stands for which matrix.
    """

    def __init__(self, stored: StoredTensors, quantized: Quantized) -> None:
        self._stored, self._matrices = stored, quantized.matrices
        hidden = quantized.ignored | {part for matrix in self._matrices.values() for part in matrix.parts}
        self._shapes = {name: shape for name, shape in stored.shapes.items() if name not in hidden}
        self._shapes |= {name: matrix.shape for name, matrix in self._matrices.items()}
        told = (
            f"{quantized.format}: {len(self._matrices)} matrices are dequantized to float32, layer by layer"
        )
        self.notice = "; ".join((told, *quantized.notes)) + "."
        self.finding = Finding(
            "quantized source",
            Outcome.APPLIED,
            details={"pass": "dequantize", "format": quantized.format, "notice": self.notice},
        )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def files(self) -> frozenset[Path]:
        return self._stored.files

    @property
    def has_grids(self) -> bool:
        """Whether any matrix is on an integer grid."""
        return any(matrix.grid is not None for matrix in self._matrices.values())

    def place(self, name: str) -> str:
        matrix = self._matrices.get(name)
        return self._stored.place(name if matrix is None else min(matrix.parts))

    def read(self, name: str) -> Tensor:
        matrix = self._matrices.get(name)
        return self._stored.read(name) if matrix is None else matrix.read()

    def grid(self, name: str) -> Grid | None:
        """Return the codes (out, in) of a tensor; None where it is stored in floats."""
        matrix = self._matrices.get(name)
        return None if matrix is None or matrix.grid is None else matrix.grid()


def dequantized(
    tensors: StoredTensors, config: PretrainedConfig, has_place: Callable[[str], bool] | None = None
) -> StoredTensors:
    """Return the tensors of a checkpoint in floats: `DequantizedTensors` where it is quantized, else as they are.

    Args:
        tensors: The stored tensors.
        config: The model's config; its `quantization_config`, or the file beside the weights that older tools
            wrote, says how they are quantized.
        has_place: Whether the model has a tensor of a name. AutoGPTQ gave every quantized module a bias: those of zeros
            that have no place are left out. None leaves all of them in.

    Raises:
        InputError: If the method or the layout is not read, parts are missing, or they do not fit each other.
    """
    quantization = quantization_of(tensors, config)
    if quantization is None:
        return tensors
    reader = _reader_of(quantization)
    found = reader(tensors, quantization, transposed=config.model_type in _TRANSPOSED)
    _check_complete(tensors, found)
    if has_place is not None:
        idle = frozenset(_idle_biases(tensors, found, has_place))
        found = replace(found, ignored=found.ignored | idle)
    return DequantizedTensors(tensors, found)


def _idle_biases(tensors: StoredTensors, found: Quantized, has_place: Callable[[str], bool]) -> Iterator[str]:
    """Yield the biases of quantized modules that the model does not have and that add nothing."""
    for matrix in found.matrices:
        bias = f"{matrix.removesuffix('.weight')}.bias"
        if bias in tensors.shapes and not has_place(bias) and not bool(tensors.read(bias).any()):
            yield bias


def _check_complete(tensors: StoredTensors, found: Quantized) -> None:
    """Refuse a checkpoint without a quantized matrix, and parts of one that the format does not have."""
    if not found.matrices:
        raise InputError(
            f"config.json says {found.format}, but not one tensor is stored so",
            where="config.json: quantization_config",
            fix="if the weights are floats, remove quantization_config from config.json",
        )
    known = found.ignored | {part for matrix in found.matrices.values() for part in matrix.parts}
    if left := sorted(
        name for name in tensors.shapes if name.rpartition(".")[2] in _LEAVES and name not in known
    ):
        raise InputError(
            f"tensor {left[0]!r} does not belong to {found.format}, which config.json names",
            where=tensors.place(left[0]),
            fix=f"config.json and the weights do not belong together, or {INCOMPLETE}",
        )
    if twice := sorted(found.matrices.keys() & (tensors.shapes.keys() - known)):
        raise InputError(
            f"tensor {twice[0]!r} is stored both in floats and quantized",
            where=tensors.place(twice[0]),
            fix="remove one of the two from the files",
        )


def quantization_of(tensors: StoredTensors, config: PretrainedConfig) -> Mapping[str, Any] | None:
    """Return what the config, or the file beside the weights that older tools wrote, says; None for nothing.

    Raises:
        InputError: If it cannot be read.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return next(_old_configs(tensors), None)
    if not isinstance(found, Mapping):
        raise InputError(
            f"quantization_config is {found!r}, an object was expected",
            where="config.json",
            fix="check the file",
        )
    return found


def _old_configs(tensors: StoredTensors) -> Iterator[dict[str, Any]]:
    """Yield what AutoGPTQ or AutoAWQ wrote beside the weights, where tensors are stored their way."""
    if not any(name.endswith(".qweight") for name in tensors.shapes):
        return
    for folder in sorted({path.parent for path in tensors.files}):
        for name, method in OLD_CONFIGS.items():
            if (path := folder / name).is_file():
                yield {"quant_method": method, **read_json(path)}


def _reader_of(quantization: Mapping[str, Any]) -> _Reader:
    """Return what reads a method's checkpoints.

    Raises:
        InputError: If nothing does.
    """
    method = str(quantization.get("quant_method") or quantization.get("method") or "").lower()
    if not method and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "modelopt" and quantization.get("quant_algo") == "FP8":
        method = "fp8"
    if (reader := _READERS.get(method)) is None:
        algorithm = quantization.get("quant_algo")
        raise InputError(
            f"the checkpoint is quantized by {method or 'no method that is named'}"
            f"{f' ({algorithm})' if algorithm else ''}, which is not read",
            where="config.json: quantization_config",
            fix="use the original checkpoint, or dequantize it once with transformers: model.dequantize(), then "
            f"save_pretrained (read here: {', '.join(_READERS)})",
        )
    return reader
