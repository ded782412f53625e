"""compressed-tensors checkpoints of tiny models, made by the package of that name."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from quantized_models import Quantizer
from torch import Tensor


def arguments(bits: int, strategy: str, *, symmetric: bool, kind: str = "int") -> QuantizationArgs:
    """Return how weights are quantized: by tensor, channel, group of 32 or block of (64, 32)."""
    sizes: dict[str, Any] = {"group": {"group_size": 32}, "block": {"block_structure": [64, 32]}}
    return QuantizationArgs(
        num_bits=bits, type=kind, symmetric=symmetric, strategy=strategy, **sizes.get(strategy, {})
    )


def compressed(form: str, weights: QuantizationArgs, dtype: torch.dtype = torch.float32) -> Quantizer:
    """Return what compresses matrices in a format, and decompresses them again as the package does."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(form)

    def quantize(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale, zero_point = calculate_qparams(*_range(matrix, weights), weights)
        state = {"weight": matrix, "weight_scale": scale.to(dtype), "weight_zero_point": zero_point}
        packed = compressor.compress(state, scheme)
        widened = {**packed, "weight_scale": packed["weight_scale"].float()}
        return packed, compressor.decompress(widened, scheme)["weight"]

    return quantize


def compressed_config(form: str, *weights: QuantizationArgs, **fields: Any) -> dict[str, Any]:
    """Return the quantization config of one group of modules for each way to quantize weights."""
    groups = {
        f"group_{number}": {
            "targets": ["Linear"],
            "weights": one.model_dump(mode="json"),
            "input_activations": None,
            "output_activations": None,
        }
        for number, one in enumerate(weights)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": groups,
        **fields,
    }


def _range(matrix: Tensor, weights: QuantizationArgs) -> tuple[Tensor, Tensor]:
    if weights.strategy == "tensor":
        return matrix.min().view(1), matrix.max().view(1)
    if weights.strategy == "channel":
        return matrix.amin(1, keepdim=True), matrix.amax(1, keepdim=True)
    if weights.strategy == "group":
        groups = matrix.view(len(matrix), -1, weights.group_size)
        return groups.amin(-1), groups.amax(-1)
    high, wide = weights.block_structure
    blocks = matrix.view(matrix.shape[0] // high, high, matrix.shape[1] // wide, wide)
    return blocks.amin((1, 3)), blocks.amax((1, 3))
