"""GGUF file -> Hugging Face folder, one tensor in memory at a time, cached by content.

GGUF stores what llama.cpp computes with, which differs from the checkpoint it was made from: q/k rows of the
llama family are permuted for interleaved rotary embedding, Gemma norms hold 1 + w, Llama-3 frequency scaling
is a tensor, and the tokenizer's splitting rule is only a name. Each is undone here; leftovers are refused.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.folders import AtomicFolder, check_free_space, sha256_of
from rk_export.gguf_config import CLASSES, GgufFile, check_magic, config_of, open_gguf
from rk_export.gguf_tokenizer import write_tokenizer

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/rk-export/gguf")
_FORMAT = 1  # raise when the conversion changes: cached folders of an older format are then made again

_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def gguf_to_folder(path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Convert a GGUF file into a Hugging Face folder, or return the one made earlier from the same content.

    The folder holds ``config.json``, ``model.safetensors`` (float16 or bfloat16 when every matrix of the file
    is, else float32, quantized blocks dequantized exactly) and the tokenizer.

    Args:
        path: The ``.gguf`` file.
        cache_dir: Where converted folders are kept; ``~/.cache/rk-export/gguf`` when None.

    Raises:
        InputError: The file is missing, truncated or no GGUF, or the disk is full.
        UnsupportedModelError: Its architecture, scaling or tokenizer rule cannot be converted faithfully.
    """
    source = Path(path).expanduser()
    check_magic(source)
    root = Path(cache_dir) if cache_dir is not None else CACHE.expanduser()
    folder = root / f"{source.stem}-{sha256_of(source)[:16]}-v{_FORMAT}"
    if folder.is_dir():
        logger.info("%s: already converted, %s", source.name, folder)
        return folder
    opened = open_gguf(source)
    if opened.architecture not in CLASSES:
        raise UnsupportedModelError(
            f"GGUF architecture {opened.architecture!r} cannot be converted",
            where=str(source),
            fix=f"use the Hugging Face checkpoint; GGUF is read for {', '.join(sorted(CLASSES))}",
        )
    with AtomicFolder(folder, force=True) as partial:
        _convert(opened, partial)
    return folder


def _convert(source: GgufFile, folder: Path) -> None:
    """Write config, weights and tokenizer of an opened GGUF file into an empty folder."""
    config = config_of(source)
    shapes = _parameter_shapes(config)
    names = _gguf_names(source, config, shapes)
    dtype = config.dtype
    needed = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    check_free_space(folder, needed)
    logger.info("%s: %d tensors to %s, %.0f MB", source.path.name, len(shapes), dtype, needed / 1e6)

    def tensor_of(name: str) -> torch.Tensor:
        return _tensor(source, config, names[name]).to(dtype)

    _stream_safetensors(folder / "model.safetensors", shapes, dtype, tensor_of)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    write_tokenizer(
        source.path,
        folder,
        model=source.get("tokenizer.ggml.model"),
        rule=source.get("tokenizer.ggml.pre"),
        max_length=config.max_position_embeddings,
    )


def _parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the checkpoint's tensor names and shapes without allocating them; a tied head is left out."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _gguf_names(
    source: GgufFile, config: PretrainedConfig, shapes: dict[str, tuple[int, ...]]
) -> dict[str, str]:
    """Map each parameter to its GGUF tensor; every tensor of the file must be used, with the right shape."""
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == source.architecture)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {}
    for name, shape in shapes.items():
        stem, suffix = name.rsplit(".", 1)
        names[name] = f"{table.get_name(stem)}.{suffix}"
        tensor = source.tensors.get(names[name])
        if tensor is None:
            raise InputError(f"tensor {names[name]} ({name}) is missing", where=str(source.path))
        if tuple(int(n) for n in reversed(tensor.shape)) != shape:
            raise InputError(
                f"tensor {names[name]} has shape {tensor.shape[::-1]}, not {shape}", where=str(source.path)
            )
    unused = sorted(set(source.tensors) - set(names.values()) - {"rope_freqs.weight"})
    if unused:
        raise UnsupportedModelError(
            f"{len(unused)} tensors have no place in {config.architectures[0]}: {', '.join(unused[:4])}",
            where=str(source.path),
            fix="use the Hugging Face checkpoint of this model",
        )
    return names


def _tensor(source: GgufFile, config: PretrainedConfig, name: str) -> torch.Tensor:
    """Dequantize one tensor and undo llama.cpp's layout."""
    stored = source.tensors[name]
    try:
        values = gguf.dequantize(stored.data, stored.tensor_type)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{name} is stored as {stored.tensor_type.name}, which cannot be dequantized",
            where=str(source.path),
        ) from error
    if source.architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
        values = rotary_halves(values, heads)
    elif source.architecture == "gemma2" and name.endswith("norm.weight"):
        values = values - 1
    return torch.from_numpy(np.array(values, copy=True))


def rotary_halves(W: np.ndarray, heads: int) -> np.ndarray:
    """Reorder q or k rows from llama.cpp's interleaved pairs to the two halves that transformers rotates.

    Args:
        W: (heads * head_dim, hidden).
        heads: Heads of this projection.
    """
    pairs = W.reshape(heads, -1, 2, W.shape[-1])  # (heads, head_dim / 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(W.shape)


def _stream_safetensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor_of: Callable[[str], torch.Tensor],
) -> None:
    """Write a safetensors file tensor by tensor, so that only one of them is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _STORED[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as handle:
        handle.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in _progress(list(shapes)):
            handle.write(tensor_of(name).contiguous().view(torch.uint8).numpy().data)


def _progress(names: list[str]) -> Iterator[str]:
    """Yield the names, logging every tenth part."""
    step = max(1, len(names) // 10)
    for done, name in enumerate(names):
        if done % step == 0:
            logger.info("dequantizing: tensor %d of %d", done + 1, len(names))
        yield name
