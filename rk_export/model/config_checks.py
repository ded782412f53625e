"""What config.json must hold so that a model can be built from it: counts that count something."""

from __future__ import annotations

from pathlib import Path

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
