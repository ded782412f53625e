"""What a model gives, by its config: the next token, hidden states, or the answers of a classifier."""

from __future__ import annotations

from typing import Literal

from transformers import PretrainedConfig

Head = Literal["sequence", "tokens"]

# Marks the config of a decoder that is used as an embedding model; the folder says so, not the config.
STATES = "gives_hidden_states"
_HEADS: tuple[tuple[str, Head], ...] = (
    ("ForSequenceClassification", "sequence"),
    ("ForTokenClassification", "tokens"),
)


def gives_states(config: PretrainedConfig) -> bool:
    """Whether a decoder is used as an embedding model: it gives hidden states and has no output projection."""
    return bool(getattr(config, STATES, False))


def mark_states(config: PretrainedConfig) -> None:
    """Note in a config that its decoder is an embedding model, in place."""
    setattr(config, STATES, True)


def head_of(config: PretrainedConfig) -> Head | None:
    """Return the kind of classifier that a model was saved with, None where it has none."""
    classes = classes_of(config)
    return next((head for end, head in _HEADS if classes and classes[0].endswith(end)), None)


def classes_of(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the names of the classes that a model was saved as; empty where its config names none."""
    classes = config.architectures or ()
    listed = classes if isinstance(classes, (list, tuple)) else (classes,)
    return tuple(map(str, listed))
