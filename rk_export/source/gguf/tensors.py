"""Which tensor of a GGUF file becomes which tensor of a checkpoint, and how its layout is undone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.source.gguf.families import Family
from rk_export.source.gguf.file import GgufFile
from rk_export.source.gguf.header import StoredTensor
from rk_export.source.gguf.rotary import ROTARY_TENSORS

Shape = tuple[int, ...]
_EXPERTS = re.compile(r"(?P<layer>model\.layers\.\d+)\.mlp\.experts\.(?P<part>gate_up_proj|down_proj)")
_STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the checkpoint comes from.

    Attributes:
        shape: Of the checkpoint's tensor.
        expert: Index into a stack of experts, None for a tensor of its own.
    """

    stored: StoredTensor
    shape: Shape
    expert: int | None = None


def origins(source: GgufFile, config: PretrainedConfig, family: Family) -> dict[str, Origin]:
    """Map each tensor of the checkpoint to its GGUF tensor.

    Raises:
        InputError: A tensor is missing or has another shape than the metadata says.
        UnsupportedModelError: A tensor of the file has no place, or cannot be dequantized.
    """
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == source.architecture)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found: dict[str, Origin] = {}
    for name, shape in _parameter_shapes(config, source.path).items():
        experts = _EXPERTS.fullmatch(name)
        if experts:
            found |= _expert_origins(source, family, experts, shape)
            continue
        router = name.replace(".mlp.gate.", f".{family.router}.") if family.expert_names else name
        stem, suffix = name.rsplit(".", 1)
        found[router] = Origin(_tensor(source, f"{table.get_name(stem)}.{suffix}", name, shape), shape)
    _check_all_used(source, family, {origin.stored.name for origin in found.values()})
    _check_encodings(source)
    return found


def checkpoint_tensor(origin: Origin, config: PretrainedConfig, family: Family) -> torch.Tensor:
    """Dequantize one tensor and undo llama.cpp's layout."""
    values, name = origin.stored.values(origin.expert), origin.stored.name
    if family.interleaved and re.search(r"\.attn_[qk]\.", name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        values = rotary_halves(values, heads)
    elif family.offset_norms and name.endswith("norm.weight"):
        values = values - 1
    return torch.from_numpy(values)


def rotary_halves(W: np.ndarray, heads: int) -> np.ndarray:
    """Reorder q or k rows from llama.cpp's interleaved pairs to the two halves that transformers rotates.

    Args:
        W: (heads * head_dim, hidden), or the bias (heads * head_dim,).
        heads: Heads of this projection.
    """
    pairs = W.reshape(heads, -1, 2, *W.shape[1:])  # (heads, head_dim / 2, 2, hidden)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(W.shape)


def _parameter_shapes(config: PretrainedConfig, path: Path) -> dict[str, Shape]:
    """Return the model's parameters and shapes without allocating them; a tied head is left out."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (RuntimeError, ValueError, ZeroDivisionError, OverflowError, KeyError) as error:
        raise InputError(
            f"the metadata makes no {config.model_type} model: {str(error).splitlines()[0]}", where=str(path)
        ) from error
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _expert_origins(
    source: GgufFile, family: Family, experts: re.Match[str], shape: Shape
) -> dict[str, Origin]:
    """Take apart a stack of experts, (experts, rows, columns), into the matrices that checkpoints store."""
    layer, block = experts["layer"], experts["layer"].replace("model.layers", "blk")
    count, rows, columns = shape
    parts = slice(2, 3)
    if experts["part"] == "gate_up_proj":
        parts, rows = slice(0, 2), rows // 2
    found = {}
    for names, stack in zip(family.expert_names[parts], _STACKS[parts], strict=True):
        stored = _tensor(source, f"{block}.{stack}.weight", experts.group(), (count, rows, columns))
        for index in range(count):
            found[f"{layer}.{names.format(index)}.weight"] = Origin(stored, (rows, columns), index)
    return found


def _tensor(source: GgufFile, stored: str, name: str, shape: Shape) -> StoredTensor:
    tensor = source.tensors.get(stored)
    if tensor is None:
        raise InputError(
            f"tensor {stored} ({name}) is missing",
            where=str(source.path),
            fix="the file is incomplete or of an old format: take a newer conversion of this model",
        )
    if tensor.shape != shape:
        raise InputError(
            f"tensor {stored} has shape {tensor.shape}, the metadata asks for {shape}", where=str(tensor.path)
        )
    return tensor


def _check_all_used(source: GgufFile, family: Family, used: set[str]) -> None:
    unused = sorted(set(source.tensors) - used - ROTARY_TENSORS)
    if unused:
        raise UnsupportedModelError(
            f"{len(unused)} tensors have no place in {family.model_class}: {', '.join(unused[:4])}",
            where=str(source.path),
            fix="use the Hugging Face checkpoint of this model",
        )


def _check_encodings(source: GgufFile) -> None:
    """Every encoding in the file can be dequantized: one block of zeros of each is tried."""
    examples = {tensor.kind: tensor.name for tensor in source.tensors.values()}
    for kind, name in examples.items():
        _, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{name} is stored as {kind.name}, which cannot be dequantized",
                where=str(source.path),
                fix="take a file in another quantization, such as Q4_K_M or Q8_0",
            ) from error
