"""What is known of one model family, and refusals of what its configs may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import Architecture, HeadLayout
from rk_export.model.config_fields import plain_heads
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.rotary import RotaryTable


@dataclass(frozen=True)
class Refused:
    """A field of the config that is read for one value only.

    Args:
        field: Its name; with a dot, a field of a part of the config.
        unless: The value that is supported; a field that is absent, None or empty counts as False.
        reason: Why no other is.
    """

    field: str
    unless: object
    reason: str

    def check(self, config: PretrainedConfig) -> None:
        """Refuse another value.

        Raises:
            UnsupportedModelError: Names the field and the value that is supported.
        """
        value: object = config
        for name in self.field.split("."):
            value = getattr(value, name, None)
        if (value or False) != self.unless:
            raise UnsupportedModelError(
                f"{self.field}={value!r}: {self.reason}",
                where="config.json",
                fix=f"use a model with {self.field}={self.unless!r}",
            )


@dataclass(frozen=True)
class RefusedLayers:
    """Kinds of layers that are not exported.

    Args:
        unless: The values of the config's ``layer_types`` that are supported.
        reason: Why no others are.
    """

    unless: tuple[str, ...]
    reason: str

    def check(self, config: PretrainedConfig) -> None:
        """Refuse another kind of layer.

        Raises:
            UnsupportedModelError: Names the kind and how many layers are of it.
        """
        others = [kind for kind in config.layer_types if kind not in self.unless]
        if others:
            kind, count = others[0], others.count(others[0])
            raise UnsupportedModelError(
                f"{count} of {len(config.layer_types)} layer_types are {kind!r}: {self.reason}",
                where="config.json",
                fix=f"use a model whose layers are all of {' or '.join(map(repr, self.unless))}",
            )


@dataclass(frozen=True)
class Family:
    """A model family: names and what its config says.

    Args:
        architecture: Names of its tensors.
        decoder: Reads what a decoder computes from a config that nothing was refused in; None for an encoder.
        refused: Options that the exported graph does not have.
        heads: Reads the attention heads.
        tables: Makes the rotary tables by name, from the config and their rows; None where the family has a module
            of transformers' common kind for them.
    """

    architecture: Architecture
    decoder: Callable[[PretrainedConfig], DecoderSpec] | None = None
    refused: tuple[Refused | RefusedLayers, ...] = ()
    heads: Callable[[PretrainedConfig], HeadLayout] = plain_heads
    tables: Callable[[PretrainedConfig, int], dict[str, RotaryTable]] | None = None

    @property
    def model_type(self) -> str:
        """Name of the family, as in ``config.model_type``."""
        return self.architecture.model_type

    def check(self, config: PretrainedConfig) -> None:
        """Refuse options that the exported graph does not have.

        Raises:
            UnsupportedModelError: Names the option and the value that is supported.
        """
        for option in self.refused:
            option.check(config)
