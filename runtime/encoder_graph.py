"""Which graphs are those of encoders, told by the names of their inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rk_export.runtime.bundle_config import BundleConfig
from rk_export.runtime.graph_proto import load_proto

STATES, VECTOR, LOGITS = "last_hidden_state", "sentence_embedding", "logits"


def is_encoder_bundle(path: str | Path) -> bool:
    """Whether a bundle's graph is that of an encoder.

    Raises:
        InputError: The folder or its graph is missing, or cannot be read.
    """
    return is_encoder(*_names(path))


def is_classifier_bundle(path: str | Path) -> bool:
    """Whether a bundle's graph is that of an encoder with a head that classifies.

    Raises:
        InputError: As `is_encoder_bundle`.
    """
    inputs, outputs = _names(path)
    return is_encoder(inputs, outputs) and LOGITS in outputs


def _names(path: str | Path) -> tuple[list[str], list[str]]:
    """Return the inputs and the outputs of a bundle's graph by name."""
    graph = load_proto(BundleConfig.read(path).model_path).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


def is_encoder(inputs: Iterable[str], outputs: Iterable[str]) -> bool:
    """Whether names of inputs and outputs are those of a graph without a cache, with states or with a head."""
    cached = any(name.startswith("past_key_values") for name in inputs)
    names = set(outputs)
    return STATES in names or (LOGITS in names and not cached)
