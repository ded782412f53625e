"""What is known of one model family, and refusals of what its configs may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import Architecture, HeadLayout
from rk_export.model.config_fields import plain_heads
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.encoder_names import ClassifierNames, with_classifier, without_head
from rk_export.model.encoder_spec import EncoderSpec
from rk_export.model.outputs import gives_states, head_of
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
        encoder: Reads what an encoder computes, its classifier aside; None for a decoder.
        base: Torch path of the encoder in the classes that have a classifier.
        sequence: Reads the classifier of texts, and `tokens` that of tokens; None where the class is not exported.
        skipped_rows: Reads how many rows of the learned positions no token takes; None = each row has its token.
        variant: Gives the names for a config that lacks some modules; None = all configs have the same.
        both_ways: Field of a decoder's config that lets tokens see those behind them: the model is an encoder then.
        tables: Makes the rotary tables by name, from the config and their rows; None where the family has a module
            of transformers' common kind for them.
    """

    architecture: Architecture
    decoder: Callable[[PretrainedConfig], DecoderSpec] | None = None
    refused: tuple[Refused | RefusedLayers, ...] = ()
    heads: Callable[[PretrainedConfig], HeadLayout] = plain_heads
    encoder: Callable[[PretrainedConfig], EncoderSpec] | None = None
    base: str = ""
    sequence: Callable[[PretrainedConfig], ClassifierNames] | None = None
    tokens: Callable[[PretrainedConfig], ClassifierNames] | None = None
    skipped_rows: Callable[[PretrainedConfig], int] | None = None
    variant: Callable[[PretrainedConfig], Architecture] | None = None
    both_ways: str = ""
    tables: Callable[[PretrainedConfig, int], dict[str, RotaryTable]] | None = None

    @property
    def model_type(self) -> str:
        """Name of the family, as in ``config.model_type``."""
        return self.architecture.model_type

    def sees_both_ways(self, config: PretrainedConfig) -> bool:
        """Whether tokens see those behind them too."""
        return self.encoder is not None or bool(self.both_ways and getattr(config, self.both_ways, False))

    def classifier(self, config: PretrainedConfig) -> ClassifierNames | None:
        """Return the classifier that a model was saved with, None where it has none that is exported."""
        read = {"sequence": self.sequence, "tokens": self.tokens, None: None}[head_of(config)]
        return None if read is None else read(config)

    def names(self, config: PretrainedConfig) -> Architecture:
        """Return the names of the class that a model is built as: with its classifier, or without a head."""
        if self.encoder is None:
            is_embedder = gives_states(config) or self.sees_both_ways(config)
            return without_head(self.architecture) if is_embedder else self.architecture
        own = self.architecture if self.variant is None else self.variant(config)
        found = self.classifier(config)
        return own if found is None else with_classifier(own, self.base, found)

    def check(self, config: PretrainedConfig) -> None:
        """Refuse options that the exported graph does not have.

        Raises:
            UnsupportedModelError: Names the option and the value that is supported.
        """
        if self.decoder is not None and not getattr(config, "is_causal", True):
            raise UnsupportedModelError(
                "is_causal=False: transformers then lets every token see all others, the exported attention is causal",
                where="config.json: is_causal",
                fix="use a model without it",
            )
        for option in self.refused:
            option.check(config)
