"""Rotary embedding of a GGUF file: base, share of the head that rotates, and scaling, as transformers states it.

Only what both read alike is converted: transformers computes YaRN (2309.00071) and LongRoPE (2402.13753) by the
same formulas as llama.cpp as long as the file leaves the weights of their terms alone.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.source.gguf.file import GgufFile

logger = logging.getLogger(__name__)

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROTARY_TENSORS = frozenset({"rope_freqs.weight", _LONG, _SHORT})
_LOCAL_THETA = 10000.0  # of Gemma 3's sliding layers, where the file does not state it


def rotary_parameters(source: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters`` for the config.

    Args:
        source: The file.
        values: Config values read so far; ``head_dim`` and ``max_position_embeddings`` are used.

    Raises:
        InputError: A value that the scaling needs is not in the file.
        UnsupportedModelError: The scaling is not known, or transformers would compute another one.
    """
    whole = _rotation(source, values)
    if source.architecture != "gemma3":
        return whole
    local = float(source.number("rope.freq_base_swa") or _LOCAL_THETA)
    return {
        "full_attention": whole,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _rotation(source: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    head_dim = values["head_dim"]
    rotary = int(source.number("rope.dimension_count") or head_dim)
    base = {"rope_theta": float(source.number("rope.freq_base") or 10000.0)}
    if rotary != head_dim:
        base["partial_rotary_factor"] = rotary / head_dim
    kind = source.model_key("rope.scaling.type")
    _check_scaled_once(source, kind)
    if _LONG in source.tensors or _SHORT in source.tensors:
        return base | _longrope(source, values, rotary)
    if kind == "yarn":
        return base | _yarn(source, values)
    if kind not in (None, "none", "linear"):
        raise UnsupportedModelError(
            f"rotary scaling {kind!r} cannot be converted",
            where=f"{source.path}, key {source.architecture}.rope.scaling.type",
            fix="use the Hugging Face checkpoint of this model",
        )
    _check_unscaled_cosines(source)
    factor = source.number("rope.scaling.factor") or source.number("rope.scale_linear")
    if kind != "none" and factor not in (None, 1.0):
        return base | {"rope_type": "linear", "factor": float(factor)}
    if "rope_freqs.weight" in source.tensors:
        return base | _llama3(source, base["rope_theta"], rotary)
    return base | {"rope_type": "default"}


def _check_scaled_once(source: GgufFile, kind: Any) -> None:
    """llama.cpp divides frequencies by a tensor and scales them on top of it; no transformers scaling does."""
    tensors = sorted(ROTARY_TENSORS & source.tensors.keys() - {_SHORT})
    ways = tensors + [f"rope.scaling.type {kind}"] * (kind in ("linear", "yarn"))
    if len(ways) > 1:
        raise UnsupportedModelError(
            f"the rotation is scaled in more than one way: {', '.join(ways)}",
            where=str(source.path),
            fix="use the Hugging Face checkpoint of this model",
        )


def _check_unscaled_cosines(source: GgufFile) -> None:
    """Only YaRN and LongRoPE have a factor on the cosines in transformers; llama.cpp applies it to any rotation."""
    factor = source.number("rope.scaling.attn_factor")
    if factor not in (None, 1.0):
        raise UnsupportedModelError(
            f"a rotation scaled by {factor} without YaRN or LongRoPE cannot be converted",
            where=f"{source.path}, key {source.architecture}.rope.scaling.attn_factor",
            fix="use the Hugging Face checkpoint of this model",
        )


def _yarn(source: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    """YaRN; llama.cpp and transformers both scale the angles' cosines by 1 + ln(factor) / 10."""
    factor = _positive(source, "rope.scaling.factor")
    _check_yarn(source, factor)
    yarn: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": source.number("rope.scaling.original_context_length")
        or values["max_position_embeddings"],
    }
    for name in ("beta_fast", "beta_slow"):
        stated = source.number(f"rope.scaling.yarn_{name}")
        if stated is not None:
            yarn[name] = float(stated)
    extra = source.number("rope.scaling.attn_factor")
    return yarn if extra in (None, 1) else yarn | {"attention_factor": extra * _yarn_scale(factor)}


def _check_yarn(source: GgufFile, factor: float) -> None:
    """Refuse what llama.cpp and transformers read differently."""
    neutral = {
        "yarn_ext_factor": (1.0,),
        "yarn_attn_factor": (1.0, _yarn_scale(factor)),  # llama.cpp computes the latter whatever is stated
        "yarn_log_multiplier": (0.0,),
    }
    for name, accepted in neutral.items():
        stated = source.number(f"rope.scaling.{name}")
        if stated is not None and not any(math.isclose(stated, value, rel_tol=1e-5) for value in accepted):
            raise UnsupportedModelError(
                f"YaRN with {name} {stated} cannot be converted",
                where=f"{source.path}, key {source.architecture}.rope.scaling.{name}",
                fix="use the Hugging Face checkpoint of this model",
            )

    if source.number("rope.scaling.yarn_attn_factor") == 1.0:
        logger.warning(
            "%s: yarn_attn_factor is 1; the cosines are scaled by %.4f all the same, as llama.cpp does",
            source.path.name,
            _yarn_scale(factor),
        )


def _positive(source: GgufFile, suffix: str) -> float:
    source.required(suffix)
    value = source.number(suffix)
    if not value or not 0 < value < math.inf:
        raise InputError(
            f"{source.architecture}.{suffix} is {value}, nothing above 0", where=str(source.path)
        )
    return float(value)


def _yarn_scale(factor: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def _longrope(source: GgufFile, values: dict[str, Any], rotary: int) -> dict[str, Any]:
    """LongRoPE: one divisor a frequency for short texts and one for long ones."""
    divisors = {}
    for name, key in ((_SHORT, "short_factor"), (_LONG, "long_factor")):
        if name not in source.tensors:
            raise InputError(f"tensor {name} is missing", where=str(source.path))
        factors = source.tensors[name].values()
        if factors.shape != (rotary // 2,):
            raise InputError(
                f"tensor {name} has shape {factors.shape}, not ({rotary // 2},)", where=str(source.path)
            )
        divisors[key] = [float(str(value)) for value in factors]
    original = int(_positive(source, "rope.scaling.original_context_length"))
    longrope = {"rope_type": "longrope", **divisors, "original_max_position_embeddings": original}
    scale = source.number("rope.scaling.attn_factor")
    if scale is None:
        return longrope
    exact = _longrope_scale(values["max_position_embeddings"] / original, original)
    # The file has it in float32; transformers computes it in float64 unless it is stated.
    return longrope if math.isclose(scale, exact, rel_tol=1e-6) else longrope | {"attention_factor": scale}


def _longrope_scale(factor: float, original: int) -> float:
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3(source: GgufFile, theta: float, rotary: int) -> dict[str, Any]:
    """Recover Llama-3 scaling from the file's tensor of frequency divisors, checked against all of them."""
    divisors = source.tensors["rope_freqs.weight"].values()
    factor = float(np.max(divisors))
    expected = llama3_divisors(theta, rotary, factor)
    if divisors.shape != expected.shape or not np.allclose(expected, divisors, rtol=1e-3):
        raise UnsupportedModelError(
            "the rotary divisors are not those of Llama 3",
            where=f"{source.path}, tensor rope_freqs.weight",
            fix="use the Hugging Face checkpoint of this model",
        )
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
