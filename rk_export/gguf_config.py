"""Metadata of a GGUF file and the transformers config that it describes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from rk_export.errors import InputError, UnsupportedModelError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
_CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_TOKEN_KEYS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
}


@dataclass(frozen=True)
class GgufFile:
    """An opened GGUF file: architecture, metadata scalars, and its tensors by GGUF name."""

    path: Path
    reader: Any
    tensors: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value, floats rounded to the shortest decimal that float32 tells apart."""
        field = self.reader.fields.get(key)
        if field is None:
            return default
        value = field.contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def model_key(self, suffix: str) -> Any:
        """Return the value of ``{architecture}.{suffix}``, None when absent."""
        return self.get(f"{self.architecture}.{suffix}")


def check_magic(path: Path) -> None:
    """Raise InputError unless the file exists and begins as a GGUF file."""
    if not path.is_file():
        raise InputError("no such file", where=str(path), fix="give the path of a .gguf file")
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise InputError(
                "not a GGUF file: it does not begin with 'GGUF'", where=str(path), fix="download it again"
            )


def open_gguf(path: Path) -> GgufFile:
    """Map a GGUF file; InputError when it is truncated or damaged."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        fix = "download it again and compare its size with the publisher's"
        raise InputError("the GGUF file is truncated or damaged", where=str(path), fix=fix) from error
    return GgufFile(path, reader, {tensor.name: tensor for tensor in reader.tensors})


def config_of(source: GgufFile) -> PretrainedConfig:
    """Build the transformers config from the file's metadata.

    Raises:
        InputError: A size that every model has is not in the file.
        UnsupportedModelError: Sizes differ between layers, or the rotary scaling is not known.
    """
    values = _stated(source)
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"):
        if name not in values:
            raise InputError(f"the metadata does not state {name}", where=str(source.path))
    if "token_embd.weight" not in source.tensors:
        raise InputError("the GGUF file holds no token embedding", where=str(source.path))
    head_dim = values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    if source.architecture == "gemma2":
        values["query_pre_attn_scalar"] = _gemma2_scale(values)
    values["vocab_size"] = int(source.tensors["token_embd.weight"].shape[-1])
    values["tie_word_embeddings"] = "output.weight" not in source.tensors
    config = AutoConfig.for_model(source.architecture, rope_parameters=_rope(source, head_dim), **values)
    config.architectures = [CLASSES[source.architecture]]
    config.dtype = _dtype(source)
    return config


def _stated(source: GgufFile) -> dict[str, Any]:
    """Return what the metadata states, under transformers' names; absent token ids are None."""
    values = {name: source.model_key(suffix) for suffix, name in _CONFIG_KEYS.items()}
    for name, value in values.items():
        if isinstance(value, list):
            raise UnsupportedModelError(f"{name} differs between layers", where=str(source.path))
    stated = {name: value for name, value in values.items() if value is not None}
    tokens = {name: source.get(f"tokenizer.ggml.{suffix}") for suffix, name in _TOKEN_KEYS.items()}
    return stated | tokens


def _gemma2_scale(values: dict[str, Any]) -> int:
    """Return Gemma 2's attention scale, absent from GGUF: hidden / heads for 27B, known by its 46 layers."""
    if values["num_hidden_layers"] == 46:
        return int(values["hidden_size"] // values["num_attention_heads"])
    return int(values["head_dim"])


def _rope(source: GgufFile, head_dim: int) -> dict[str, Any]:
    """Return the rotary parameters: base, share of the head that rotates, and scaling."""
    rotary = source.model_key("rope.dimension_count") or head_dim
    base = {"rope_theta": source.model_key("rope.freq_base") or 10000.0}
    if rotary != head_dim:
        base["partial_rotary_factor"] = rotary / head_dim
    kind = source.model_key("rope.scaling.type")
    if kind not in (None, "none", "linear"):
        raise UnsupportedModelError(f"rotary scaling {kind!r} cannot be converted", where=str(source.path))
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": source.model_key("rope.scaling.factor")}
    if "rope_freqs.weight" in source.tensors:
        return base | _llama3_scaling(source, base["rope_theta"], rotary)
    return base | {"rope_type": "default"}


def _llama3_scaling(source: GgufFile, theta: float, rotary: int) -> dict[str, Any]:
    """Recover Llama-3 scaling from the file's tensor of frequency divisors, checked against all of them."""
    divisors = source.tensors["rope_freqs.weight"].data
    factor = float(np.max(divisors))
    if not np.allclose(llama3_divisors(theta, rotary, factor), divisors, rtol=1e-3):
        raise UnsupportedModelError("the rotary divisors are not those of Llama 3", where=str(source.path))
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def llama3_divisors(theta: float, rotary: int, factor: float) -> np.ndarray:
    """Divisors of the rotary frequencies (rotary/2,) under Llama-3 scaling from a context of 8192."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, rotary, 2) / rotary)
    share = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)  # 0: slow, fully scaled; 1: fast, kept
    return np.asarray(1.0 / ((1.0 - share) / factor + share))


def _dtype(source: GgufFile) -> torch.dtype:
    """Return the matrices' own half precision, or float32 when any of them is quantized or float32."""
    kinds = {tensor.tensor_type.name for tensor in source.tensors.values() if len(tensor.shape) > 1}
    return {("F16",): torch.float16, ("BF16",): torch.bfloat16}.get(tuple(kinds), torch.float32)
