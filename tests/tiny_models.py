"""Tiny random Hugging Face models of every family in `tiny_families`; a dropped term is visible."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_families import TABLE
from tiny_families.entry import TinyFamily
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

# The sample that the tests of all packages run over, encoders last; tests/families runs over all.
FAMILIES: tuple[str, ...] = tuple(
    sorted(
        (name for name, family in TABLE.items() if family.in_sample), key=lambda name: TABLE[name].is_encoder
    )
)
DECODERS: tuple[str, ...] = tuple(name for name in FAMILIES if not TABLE[name].is_encoder)
EVERY_FAMILY: tuple[str, ...] = tuple(TABLE)
EVERY_MODEL: tuple[str, ...] = tuple(name for family in TABLE.values() for name in family.names)


def family_of(name: str) -> TinyFamily:
    """Return the entry of a family or of its variant ``FAMILY:VARIANT``."""
    return TABLE[name.partition(":")[0]]


def auto_class(family: str) -> Any:
    """Return the class of transformers that builds a family's models."""
    return AutoModel if family_of(family).is_encoder else AutoModelForCausalLM


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """Return the config of a tiny model: hidden 64, 4 heads, vocabulary 160, 128 positions.

    Args:
        family: One of ``EVERY_MODEL``.
        **overrides: Fields of the family's config.
    """
    entry, variant = family_of(family), family.partition(":")[2]
    return AutoConfig.for_model(entry.model_type or entry.name, **entry.config_fields(variant) | overrides)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a tiny random model: fp32, evaluation mode, eager attention.

    Every parameter is random, biases and norm gains too, so that a dropped one is noticed.

    Args:
        family: One of ``EVERY_MODEL``.
        seed: Of the weights.
        **overrides: Fields of the family's config.
    """
    return random_model(family, tiny_config(family, **overrides), seed)


def random_model(family: str, config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a config's model with random weights, as `tiny_model` does; the same seed gives the same tensors."""
    entry = family_of(family)
    # Some classes compute tables in the type that they are built in, which no later cast makes exact.
    model: PreTrainedModel = (
        auto_class(family).from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in _stored(model):
            centre = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
            tensor.copy_(centre + 0.25 * torch.randn(tensor.shape, generator=generator))
        if entry.finish is not None:
            entry.finish(model)
    return model


def _stored(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint holds: parameters, and buffers in floats such as the biases of some routers."""
    yield from model.named_parameters()
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            yield name, buffer


def massive(llama: Path, folder: Path) -> Path:
    """Save the tiny model with one row of the first down_proj 1,000 times larger: a massive activation."""
    shutil.copytree(llama, folder)
    model = tiny_model("llama", vocab_size=320)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[5] *= 1000
    model.save_pretrained(folder)
    return folder


def transformers_own(folder: Path, auto: Any = AutoModelForCausalLM, **config: Any) -> PreTrainedModel:
    """Return a folder's model as transformers loads it: float32, eager attention, evaluation mode."""
    model: PreTrainedModel = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **config
    )
    return model.eval()
