"""What config.json must hold so that a model can be built from it: counts that count something, fields that fit."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from rk_export.errors import InputError

# What transformers and PyTorch raise when a field has a value that no model can be built with.
UNUSABLE_CONFIG = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
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


def unbuildable(config: PretrainedConfig, error: BaseException) -> InputError:
    """Return the message about a config from which transformers builds no model.

    Args:
        config: As transformers read it.
        error: What building raised.
    """
    return InputError(
        f"transformers builds no {config.model_type} model from it ({type(error).__name__}: {one_line(error)})",
        where="config.json",
        fix="correct the entry that the message is about, or take the file that the model was published with",
    )


def one_line(error: BaseException) -> str:
    """Return the text of an error in one line, for those that state the reason below their first."""
    return re.sub(r"\s+", " ", str(error)).strip()[:400] or type(error).__name__
