"""Rotary position tables, computed by the model family's own Hugging Face module.

GroupQueryAttention reads cosines and sines of absolute positions from two tables, so every scaling whose
frequencies depend on the position alone is exact. LongRoPE (arXiv:2402.13753) has one table for short and one
for long sequences; they are stored below each other and the graph cuts the one in use out of them, by the length
of the longest row. Keys in the cache keep the rotation they got: a caller whose text grows past the short table
must run it anew, as Hugging Face ``generate`` does and our runtime too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rk_export.errors import UnsupportedModelError

EXACT_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
ALL_LAYERS = "all"


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines by position.

    Args:
        cos: (rows, rotated width / 2), float32.
        sin: As ``cos``.
        long_from: None, or the number of rows of the table for short sequences, which come first; sequences
            with more tokens than that use the rows after them.
    """

    cos: npt.NDArray[np.float32]
    sin: npt.NDArray[np.float32]
    long_from: int | None = None


def rotary_tables(config: PretrainedConfig, module_class: type[nn.Module]) -> dict[str, RotaryTable]:
    """Compute the tables of a model, up to ``max_position_embeddings``.

    Args:
        config: The model's config.
        module_class: The family's rotary embedding class.

    Returns:
        Layer type -> table where ``rope_parameters`` is given by layer type, else one table ``ALL_LAYERS``.

    Raises:
        UnsupportedModelError: The frequencies are not a function of the position, or the kernels refuse the
            rotated width.
    """
    by_type: dict[str | None, dict[str, Any]] = {None: config.rope_parameters}  # None: one for all layers
    if "rope_type" not in config.rope_parameters:
        by_type = {name: config.rope_parameters[name] for name in sorted(set(config.layer_types))}
    for parameters in by_type.values():
        _check_exact(parameters)
    module = module_class(config=config)
    return {
        name or ALL_LAYERS: _table(config, parameters, module, name) for name, parameters in by_type.items()
    }


def _table(
    config: PretrainedConfig, parameters: dict[str, Any], module: nn.Module, layer_type: str | None
) -> RotaryTable:
    prefix = "" if layer_type is None else f"{layer_type}_"
    frequencies = cast(torch.Tensor, getattr(module, f"{prefix}inv_freq"))
    scale = cast(float, getattr(module, f"{prefix}attention_scaling"))
    _check_width(2 * len(frequencies))
    positions = config.max_position_embeddings
    if parameters["rope_type"] != "longrope":
        return RotaryTable(*_cos_sin(frequencies, positions, scale))
    short_rows = int(parameters["original_max_position_embeddings"])
    if short_rows >= positions:
        return RotaryTable(*_cos_sin(frequencies, positions, scale))
    long_frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](
        config, None, seq_len=short_rows + 1, layer_type=layer_type
    )
    short, long = _cos_sin(frequencies, short_rows, scale), _cos_sin(long_frequencies, positions, scale)
    cos, sin = (np.concatenate(pair) for pair in zip(short, long, strict=True))
    return RotaryTable(cos, sin, long_from=short_rows)


def _check_exact(parameters: dict[str, Any]) -> None:
    if parameters["rope_type"] not in EXACT_ROPE_TYPES:
        raise UnsupportedModelError(
            f"rotary scaling {parameters['rope_type']!r}: its angles depend on more than the position",
            where="config.json: rope_parameters",
            fix=f"use a model with one of {', '.join(EXACT_ROPE_TYPES)}",
        )


def _check_width(rotated: int) -> None:
    if rotated % 16:
        raise UnsupportedModelError(
            f"{rotated} values of each head are rotated; GroupQueryAttention rotates multiples of 16",
            where="config.json: head_dim, partial_rotary_factor",
        )


def _cos_sin(
    frequencies: torch.Tensor, positions: int, scale: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies.float())
    return (angles.cos() * scale).numpy(), (angles.sin() * scale).numpy()
