"""Rotary positions, as the model family's own Hugging Face module has them.

GroupQueryAttention reads cosines and sines of absolute positions from two tables, so every scaling whose
frequencies depend on the position alone is exact. The graph holds the frequencies and computes the tables from
them, in the arithmetic of transformers: the angle is a product in float32. LongRoPE (arXiv:2402.13753) has
frequencies for short and for long sequences; both tables lie below each other and the graph cuts the one in use
out of them. Keys in the cache keep the rotation they got: a caller whose
text grows past the short table must run it anew, as Hugging Face ``generate`` does and our runtime too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rk_export.errors import UnsupportedModelError
from rk_export.runtime.bundle_config import SHORT_FACTORS_ONLY

# "dynamic" has its first frequencies up to max_position_embeddings; no bundle of it takes more positions.
EXACT_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
ALL_LAYERS = "all"
# GroupQueryAttention rotates only multiples of this many coordinates, in heads that are as many wide or a multiple.
ROTATED_MULTIPLE = 16


@dataclass(frozen=True)
class RotaryPart:
    """Rows of a table that share their frequencies.

    Args:
        frequencies: (rotated width / 2), float32, in radians a position.
        rows: Positions from 0 on.
    """

    frequencies: npt.NDArray[np.float32]
    rows: int


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines by position.

    Args:
        parts: One part; or two, for short and for long sequences: sequences with more tokens than the first
            part has rows use the second.
        scale: Factor on cosines and sines.
    """

    parts: tuple[RotaryPart, ...]
    scale: float

    @property
    def long_from(self) -> int | None:
        """Rows of the table for short sequences where there is one for long sequences too, else None."""
        return self.parts[0].rows if len(self.parts) > 1 else None

    @property
    def width(self) -> int:
        """Coordinates of a head that are rotated."""
        return 2 * len(self.parts[0].frequencies)

    def computed_bytes(self, float_bytes: int) -> int:
        """Return the memory of both tables once they are computed."""
        return sum(2 * part.rows * len(part.frequencies) * float_bytes for part in self.parts)


def rotary_parameters(config: PretrainedConfig) -> dict[str | None, dict[str, Any]]:
    """Return the rotary parameters by layer type, or under None where all layers have the same; empty for none.

    What stands beside those by layer type is read by nothing.
    """
    given = getattr(config, "rope_parameters", None) or {}
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) & given.keys())
    if kinds:
        return {kind: given[kind] for kind in kinds}
    return {None: given} if given else {}


def rotary_tables(
    config: PretrainedConfig, module_class: type[nn.Module], positions: int, used: Collection[str | None]
) -> dict[str, RotaryTable]:
    """Return the tables of a model.

    Args:
        config: The model's config.
        module_class: The family's rotary embedding class.
        positions: Rows of a table, the longest sequence.
        used: The names of the tables that the layers use, None among them for layers without rotation.

    Returns:
        Those tables by name: layer types where ``rope_parameters`` is given by layer type, else ``ALL_LAYERS``.

    Raises:
        UnsupportedModelError: The frequencies are not a function of the position.
    """
    if not any(used):
        return {}
    by_type = rotary_parameters(config)
    for parameters in by_type.values():
        _check_exact(parameters)
    module = module_class(config=config)
    return {
        name or ALL_LAYERS: _table(config, parameters, module, name, positions)
        for name, parameters in by_type.items()
        if (name or ALL_LAYERS) in used
    }


def check_widths(tables: Mapping[str, RotaryTable], head_dim: int) -> None:
    """Refuse to rotate more coordinates than a head has.

    Raises:
        UnsupportedModelError: Names both numbers.
    """
    for table in tables.values():
        if table.width > head_dim:
            raise UnsupportedModelError(
                f"{table.width} coordinates of a head would be rotated, it has {head_dim}",
                where="config.json: partial_rotary_factor, rotary_pct, rotary_dim",
                fix="give the share that the weights were made with",
            )


def _table(
    config: PretrainedConfig,
    parameters: dict[str, Any],
    module: nn.Module,
    layer_type: str | None,
    positions: int,
) -> RotaryTable:
    prefix = "" if layer_type is None else f"{layer_type}_"
    frequencies = cast(torch.Tensor, getattr(module, f"{prefix}inv_freq"))
    scale = cast(float, getattr(module, f"{prefix}attention_scaling"))
    if config.model_type in SHORT_FACTORS_ONLY and parameters["rope_type"] != "default":
        return RotaryTable((_part(frequencies, positions),), _stated_scale(parameters))
    if parameters["rope_type"] != "longrope":
        return RotaryTable((_part(frequencies, positions),), scale)
    switch = int(parameters["original_max_position_embeddings"])
    short = _part(frequencies, min(switch, positions))
    if positions <= switch:
        return RotaryTable((short,), scale)
    long_frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](
        config, None, seq_len=switch + 1, layer_type=layer_type
    )
    return RotaryTable((short, _part(long_frequencies, positions)), scale)


def _stated_scale(parameters: dict[str, Any]) -> float:
    """Return the scale that a family states where it keeps the frequencies of short sequences for long ones.

    Raises:
        UnsupportedModelError: Long sequences have another: one table has one scale.
    """
    short, long = parameters["short_mscale"], parameters["long_mscale"]
    if short != long:
        raise UnsupportedModelError(
            f"short_mscale {short} and long_mscale {long}: one rotary table has one scale",
            where="config.json: rope_parameters",
            fix="use a model whose two scales are equal",
        )
    return float(short)


def _part(frequencies: torch.Tensor, rows: int) -> RotaryPart:
    return RotaryPart(frequencies.float().numpy(), rows)


def _check_exact(parameters: dict[str, Any]) -> None:
    if parameters["rope_type"] not in EXACT_ROPE_TYPES:
        raise UnsupportedModelError(
            f"rotary scaling {parameters['rope_type']!r}: it is not known to rotate by the position alone",
            where="config.json: rope_parameters",
            fix=f"use a model with one of {', '.join(EXACT_ROPE_TYPES)}",
        )
