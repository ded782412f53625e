"""Quantized checkpoints of tiny models, packed by plain loops from the published layouts, for the readers' tests.

Nothing here is shared with the readers: codes are placed one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_files import edit_config
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, transformers_own
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitnet import pack_weights


@dataclass(frozen=True)
class Codes:
    """A random grid: codes (in, out), zero points and scales (groups, out), the group of each input."""

    bits: int
    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor

    def dense(self) -> Tensor:
        """Return the matrix (out, in), float32."""
        scales, zeros = self.scales.float()[self.groups], self.zeros[self.groups]
        return ((self.codes - zeros) * scales).T.contiguous()


def random_codes(
    rows: int,
    columns: int,
    bits: int = 4,
    size: int = 32,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    seed: int = 0,
) -> Codes:
    """Return a random grid of a linear module (in `columns`, out `rows`), scales in fp16."""
    generator = torch.Generator().manual_seed(seed)
    size = columns if size <= 0 else size
    groups = torch.arange(columns) // size
    if act_order:
        groups = groups[torch.randperm(columns, generator=generator)]
    count = -(-columns // size)
    codes = torch.randint(0, 2**bits, (columns, rows), generator=generator)
    zeros = torch.randint(1, 2**bits, (count, rows), generator=generator)
    if symmetric:
        zeros = torch.full((count, rows), 2 ** (bits - 1))
    scales = (0.5 + torch.rand((count, rows), generator=generator)) * 0.6 / 2**bits
    return Codes(bits, codes, zeros, scales.half(), groups)


def bit_stream(values: Any, bits: int) -> list[int]:
    """Return signed 32-bit words that hold values one after the other, low bits first."""
    whole = 0
    for place, value in enumerate(values):
        whole |= int(value) << (place * bits)
    count = -(-len(values) * bits // 32)
    words = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def gptq_tensors(grid: Codes, *, version: int, act_order: bool) -> dict[str, Tensor]:
    """Return what AutoGPTQ (version 1) or GPTQModel's gptq_v2 stores."""
    columns = [bit_stream(column, grid.bits) for column in grid.codes.T]
    stored = grid.zeros - (1 if version == 1 else 0)
    rows = [bit_stream(row, grid.bits) for row in stored]
    tensors = {
        "qweight": torch.tensor(columns, dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor(rows, dtype=torch.int32),
        "scales": grid.scales.clone(),
    }
    if act_order:
        tensors["g_idx"] = grid.groups.to(torch.int32)
    return tensors


def awq_tensors(grid: Codes) -> dict[str, Tensor]:
    """Return what AutoAWQ's gemm layout stores: eight outputs a word, evens first."""

    def packed(values: Tensor) -> Tensor:
        words = np.zeros((len(values), values.shape[1] // 8), dtype=np.int64)
        for row, line in enumerate(values.tolist()):
            for word in range(words.shape[1]):
                for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    words[row, word] |= line[8 * word + column] << (4 * place)
        return torch.from_numpy(words.astype(np.uint32).view(np.int32))

    return {"qweight": packed(grid.codes), "qzeros": packed(grid.zeros), "scales": grid.scales.clone()}


Quantizer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]

# Of the matrices inside the layers; routers stay in floats, as they do in published checkpoints.
_MATRIX = re.compile(r"(layers|h)\.\d+\.(?!.*\bgate\.weight).*(?<!norm)(?<!ln_1)(?<!ln_2)\.weight")


def save_quantized(
    model: PreTrainedModel, folder: Path, config: dict[str, Any] | None, quantize: Quantizer
) -> PreTrainedModel:
    """Write a model whose matrices are quantized, and return transformers' model with the values they stand for.

    Args:
        model: A tiny model.
        folder: Where it goes.
        config: The quantization config; None writes none.
        quantize: Returns the parts of a matrix (out, in), and the matrix (out, in) that they stand for.
    """
    model.save_pretrained(folder)
    path, transposed = folder / "model.safetensors", model.config.model_type == "gpt2"
    tensors = load_file(path)
    parts: dict[str, Tensor] = {}
    for name in [name for name in tensors if _MATRIX.search(name)]:
        matrix = tensors[name].T if transposed else tensors[name]
        module = name.removesuffix(".weight")
        stored, dense = quantize(module, matrix)
        parts |= {f"{module}.{leaf}": tensor.contiguous() for leaf, tensor in stored.items()}
        tensors[name] = (dense.T if transposed else dense).float().contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    left = {name: tensor for name, tensor in tensors.items() if not _MATRIX.search(name)}
    save_file({**left, **parts}, path, metadata={"format": "pt"})
    if config is not None:
        edit_config(folder, quantization_config=config)
    return reference


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of model.safetensors in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def gptq(version: int = 1, **grid: Any) -> Quantizer:
    """Return what puts random grids in place of matrices, as GPTQ stores them."""

    def quantize(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes = random_codes(*matrix.shape, seed=len(name), **grid)
        return gptq_tensors(codes, version=version, act_order=grid.get("act_order", False)), codes.dense()

    return quantize


def gptq_config(**fields: Any) -> dict[str, Any]:
    """Return the quantization config of 4-bit GPTQ in groups of 32."""
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, **fields}


def awq(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Put a random grid in the place of a matrix, as AWQ stores it."""
    codes = random_codes(*matrix.shape, seed=len(name))
    return awq_tensors(codes), codes.dense()


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def fp8(block: tuple[int, int] | None) -> Quantizer:
    """Return what rounds matrices to FP8, block by block; None is one scale for all."""

    def quantize(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        high, wide = block or matrix.shape
        scales = torch.zeros(-(-matrix.shape[0] // high), -(-matrix.shape[1] // wide))
        codes, dense = matrix.to(torch.float8_e4m3fn), torch.zeros_like(matrix)
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                part = slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide)
                scales[row, column] = matrix[part].abs().max() / 448
                codes[part] = (matrix[part] / scales[row, column]).to(torch.float8_e4m3fn)
                dense[part] = codes[part].float() * scales[row, column]
        return {"weight": codes, "weight_scale_inv": scales if block else scales.reshape(())}, dense

    return quantize


def fp8_config(block: tuple[int, int] | None) -> dict[str, Any]:
    """Return the quantization config of FP8 with blocks."""
    size = None if block is None else list(block)
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}


def bitnet(*, multiplies: bool = False) -> Quantizer:
    """Return what rounds matrices to -1, 0 and 1 and packs four rows into a byte, with transformers' function."""

    def quantize(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = matrix.abs().mean()
        ternary = (matrix / scale).round().clamp(-1, 1)
        stored = scale if multiplies else 1 / scale
        parts = {"weight": pack_weights(ternary.clone()), "weight_scale": stored.reshape(1)}
        return parts, ternary * scale

    return quantize


def small(family: str = "llama", **fields: Any) -> PreTrainedModel:
    """Return a tiny model of one layer, wide enough for blocks of 128."""
    return tiny_model(family, **{"num_hidden_layers": 1, "hidden_size": 128, **fields})


BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "packed in bf16": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


def save_bitsandbytes(folder: Path, family: str, fields: dict[str, Any]) -> Path:
    """Write a tiny model that bitsandbytes quantized; return its folder."""
    small(family).save_pretrained(folder / "floats")
    transformers_own(folder / "floats", quantization_config=BitsAndBytesConfig(**fields)).save_pretrained(
        folder / "quantized"
    )
    return folder / "quantized"


def without(suffix: str) -> Callable[[dict[str, Tensor]], None]:
    """Return what drops the tensors whose names end so."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(suffix)]:
            del tensors[name]

    return change
