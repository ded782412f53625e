"""GGUF file -> Hugging Face folder, one tensor in memory at a time, cached by content.

GGUF stores what llama.cpp computes with, which differs from the checkpoint it was made from: q/k rows of the
llama family are permuted for interleaved rotary embedding, Gemma norms hold 1 + w, experts are stacked, Llama-3
frequency scaling is a tensor, and the tokenizer's splitting rule is only a name. Each is undone here; leftovers
are refused, from the header alone, before a weight is read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from rk_export import tensor_cache
from rk_export.cache_limit import keep_within_limit, release, use_folder
from rk_export.folders import AtomicFolder, check_free_space
from rk_export.progress import track
from rk_export.source.gguf.config import config_of
from rk_export.source.gguf.families import Family, family_of
from rk_export.source.gguf.file import GgufFile, open_gguf
from rk_export.source.gguf.tensors import Origin, checkpoint_tensor, origins
from rk_export.source.gguf.tokenizer import WHOLE_WORDS_FIRST, check_tokenizer, write_tokenizer

logger = logging.getLogger(__name__)

_QUANTIZATION = re.compile(r"[.-](?:I?Q\d(?:_\w+)?|MXFP4|BF16|F16|F32)$", re.IGNORECASE)
CACHE = tensor_cache.CACHE / "gguf"
# Raise what changes: cached folders of an older format are then made again, the others stay.
_FORMAT, _FORMAT_OF_WHOLE_WORDS = 2, 3

_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Conversion:
    """What the header says about a file that can be converted."""

    source: GgufFile
    family: Family
    config: PretrainedConfig
    tensors: Mapping[str, Origin]


def gguf_to_folder(path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Convert a GGUF model into a Hugging Face folder, or return the one made earlier from the same content.

    The folder holds ``config.json``, ``model.safetensors`` (float16 or bfloat16 when every matrix of the file
    is, else float32, quantized blocks dequantized exactly) and the tokenizer. All that can be refused is refused
    from the header, before the weights are read.

    Args:
        path: The ``.gguf`` file; any shard of a split one stands for all.
        cache_dir: Where converted folders are kept; ``~/.cache/rk-export/gguf`` when None.

    Raises:
        InputError: A file is missing, truncated or no GGUF, shards do not belong together, or the disk is full.
        UnsupportedModelError: Its architecture, scaling, encoding or tokenizer cannot be converted faithfully.
    """
    conversion = _read(Path(path).expanduser())
    source = conversion.source
    root = Path(cache_dir) if cache_dir is not None else CACHE.expanduser()
    folder = root / f"{source.digest()[:16]}-v{_format(source)}" / model_name(source.stem)
    use_folder(folder.parent)
    if folder.is_dir():
        logger.info("%s: already converted, %s", source.path.name, folder)
        return folder
    try:
        with AtomicFolder(folder, force=True) as partial:
            _convert(conversion, partial)
    except BaseException:
        with contextlib.suppress(OSError):  # where it holds another name's model
            folder.parent.rmdir()
            release(folder.parent)
        raise
    use_folder(folder.parent)
    keep_within_limit(root.parent)
    return folder


def model_name(stem: str) -> str:
    """Return the name of a model from that of its file: without the quantization that people write behind it."""
    return _QUANTIZATION.sub("", stem)


def _format(source: GgufFile) -> int:
    rule = str(source.get("tokenizer.ggml.pre"))
    return _FORMAT_OF_WHOLE_WORDS if rule in WHOLE_WORDS_FIRST else _FORMAT


def _read(path: Path) -> _Conversion:
    """Read the header and check everything that it shows."""
    source = open_gguf(path)
    family = family_of(source)
    check_tokenizer(source)
    config = config_of(source, family)
    return _Conversion(source, family, config, origins(source, config, family))


def _convert(conversion: _Conversion, folder: Path) -> None:
    """Write config, weights and tokenizer of an opened GGUF model into an empty folder."""
    config, tensors = conversion.config, conversion.tensors
    dtype = config.dtype
    shapes = {name: origin.shape for name, origin in tensors.items()}
    needed = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    check_free_space(folder, needed)
    logger.info(
        "%s: %d tensors to %s, %.0f MB", conversion.source.path.name, len(shapes), dtype, needed / 1e6
    )

    def tensor_of(name: str) -> torch.Tensor:
        return checkpoint_tensor(tensors[name], config, conversion.family).to(dtype)

    write_tokenizer(conversion.source, folder, max_length=config.max_position_embeddings)
    config.save_pretrained(folder)
    _generation_defaults(conversion.source, config).save_pretrained(folder)
    _stream_safetensors(folder / "model.safetensors", shapes, dtype, tensor_of)


def _generation_defaults(source: GgufFile, config: PretrainedConfig) -> GenerationConfig:
    """Return the defaults of generation; a chat model stops at the end of its turn as well."""
    defaults = GenerationConfig.from_model_config(config)
    turn = source.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != config.eos_token_id:
        defaults.eos_token_id = [token for token in (config.eos_token_id, turn) if token is not None]
    return defaults


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
        for name in track(shapes, "dequantizing tensors"):
            handle.write(tensor_of(name).contiguous().view(torch.uint8).numpy().data)
