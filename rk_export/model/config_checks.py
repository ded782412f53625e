"""What config.json must hold so that a model can be built from it: counts that count something."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from rk_export.errors import InputError

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

# Names of fields that say how many of something there are, and how many there may be.
_NUMBER_OF = re.compile(r"^num_|^n_(layers?|heads?|experts?)$|(^|_)layers$")
_MOST = 100_000


def check_stated(values: Mapping[str, Any], path: Path) -> None:
    """Refuse numbers of layers, heads, labels ... that no model has: transformers makes an object of each.

    Args:
        values: What config.json holds.
        path: The file, for the message.

    Raises:
        InputError: Names the field.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_stated(value, path)
        elif isinstance(value, (int, float)) and _NUMBER_OF.search(name) and not value <= _MOST:
            raise InputError(
                f"{name} is {reprlib.repr(value)}; no model has more than {_MOST:,}",
                where=str(path),
                fix="give the number that the weights were made with",
            )


def check_layers(config: PretrainedConfig, tensors: int) -> None:
    """Refuse more layers than there are tensors: each would be built before the first is missed.

    Args:
        config: As transformers read it.
        tensors: How many the files hold.

    Raises:
        InputError: Names both numbers.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, (int, float)) and layers > tensors:
        raise InputError(
            f"the config asks for {layers:,} layers, the files hold {tensors:,} tensors",
            where="config.json",
            fix="config.json and the weights do not belong together, or the checkpoint is incomplete",
        )


def check_counts(config: PretrainedConfig, path: Path) -> None:
    """Refuse a config with a size or a number below one.

    Args:
        config: As transformers read it.
        path: Its file, for the message.

    Raises:
        InputError: Names the field as the file does.
    """
    for name in _COUNTS:
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 1:
            raise InputError(
                f"{config.attribute_map.get(name, name)} is {value}",
                where=str(path),
                fix="give the number that the weights were made with; it is at least 1",
            )
