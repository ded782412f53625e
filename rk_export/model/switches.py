"""Lengths at which a decoder begins to compute otherwise: what a probe has to cross to see it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from rk_export.model.context import own_context
from rk_export.model.description import ModelDescription
from rk_export.model.rotary import rotary_parameters
from rk_export.runtime.bundle_config import SHORT_FACTORS_ONLY

WINDOW, LONG_ROTATION = "sliding window", "switch of the long rotation"
# What a generation of the runtime crosses as PyTorch does.
CROSSED_BY_RUNTIME = (WINDOW, LONG_ROTATION)


@dataclass(frozen=True)
class Switch:
    """One length that changes what a model computes.

    Args:
        name: What switches.
        tokens: The longest text that is computed the first way.
        context: Most positions that the model takes.
    """

    name: str
    tokens: int
    context: int

    def __str__(self) -> str:
        return f"{self.name} at {self.tokens:,} tokens"


def switches_of(description: ModelDescription) -> tuple[Switch, ...]:
    """Return the switches within a decoder's context, shortest first; an encoder has none.

    Raises:
        UnsupportedModelError: If the config turns on what the graph does not have.
    """
    if description.architecture.is_encoder:
        return ()
    config = description.config
    context = own_context(config)
    windows = {layer.window for layer in description.decoder.layers if layer.window is not None}
    found = [(WINDOW, window) for window in windows]
    found += [(LONG_ROTATION, tokens) for tokens in _long_rotations(config)]
    switches = (Switch(name, tokens, context) for name, tokens in found if tokens < context)
    return tuple(sorted(switches, key=lambda item: item.tokens))


def _long_rotations(config: PretrainedConfig) -> set[int]:
    """Return where LongRoPE (arXiv 2402.13753) changes its frequencies, for each kind of layer."""
    if config.model_type in SHORT_FACTORS_ONLY:
        return set()
    return {
        int(table["original_max_position_embeddings"])
        for table in rotary_parameters(config).values()
        if table.get("rope_type") == "longrope"
    }
