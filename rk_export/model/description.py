"""What a model is, worked out once from its config: family, heads, decoder, every matrix by name and shape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rk_export.matrix_id import MatrixId
from rk_export.model.architecture import Architecture, HeadLayout, Projection
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.encoder_spec import EncoderSpec
from rk_export.model.families.registry import architecture_of, decoder_spec, encoder_spec, family_of, heads_of
from rk_export.model.matrices import Matrix
from rk_export.model.rotary import RotaryTable, check_widths, rotary_tables
from rk_export.model.torch_models import empty_model
from rk_export.passes.base import Layer


@dataclass(frozen=True, eq=False)
class ModelDescription:
    """What is known of a model without its weights; a source carries it, and hands it down.

    What costs something is worked out when it is first asked for, and kept: the config must not change any more.

    Args:
        config: Of a supported family.
        architecture: The family.
    """

    config: PretrainedConfig
    architecture: Architecture

    def __reduce__(self) -> tuple[Callable[[PretrainedConfig], ModelDescription], tuple[PretrainedConfig]]:
        """Travel between processes as the config alone: the rest follows from it."""
        return describe, (self.config,)

    @property
    def model_type(self) -> str:
        """The family's name."""
        return str(self.config.model_type)

    @property
    def layer_count(self) -> int:
        """Number of decoder (or encoder) layers."""
        return int(self.config.num_hidden_layers)

    @property
    def is_tied(self) -> bool:
        """Whether the output projection is the token embedding; an encoder has none."""
        return self.architecture.lm_head is not None and bool(
            getattr(self.config, "tie_word_embeddings", False)
        )

    @cached_property
    def table_shape(self) -> tuple[int, int]:
        """Rows and columns of the token embedding."""
        weight = cast(nn.Embedding, self.canonical.get_submodule(self.architecture.embedding)).weight
        return (weight.shape[0], weight.shape[1])

    @property
    def table_count(self) -> int:
        """How many tables of vocabulary size are stored: two where the output projection has weights of its own."""
        return 1 if self.is_tied or self.architecture.lm_head is None else 2

    @cached_property
    def heads(self) -> HeadLayout:
        """The attention heads, the same in every layer."""
        return heads_of(self.config)

    @cached_property
    def decoder(self) -> DecoderSpec:
        """What the decoder computes.

        Raises:
            UnsupportedModelError: The config turns on an option that the exported graph does not have.
        """
        return decoder_spec(self.config)

    @cached_property
    def encoder(self) -> EncoderSpec:
        """What the encoder computes.

        Raises:
            UnsupportedModelError: The config turns on an option that the exported graph does not have.
        """
        return encoder_spec(self.config)

    @property
    def spec(self) -> DecoderSpec | EncoderSpec:
        """What the model computes.

        Raises:
            UnsupportedModelError: As `decoder` and `encoder`.
        """
        return self.encoder if self.architecture.is_encoder else self.decoder

    def rotary_tables(self, positions: int) -> dict[str, RotaryTable]:
        """Return the rotary tables that the layers read, by name; none where nothing is rotated.

        Args:
            positions: Rows of a table, the longest sequence.

        Raises:
            UnsupportedModelError: The angles do not depend on the position alone, or are more than a head has pairs.
        """
        if not self.spec.is_rotated:
            return {}
        if (own := family_of(self.config).tables) is not None:
            tables = own(self.config, positions)
        else:
            module = type(self.canonical.get_submodule(self.architecture.rotary))
            used = {layer.rotary for layer in self.spec.layers}
            tables = rotary_tables(self.config, module, positions, used)
        check_widths(tables, self.heads.head_dim)
        return tables

    @property
    def outer_paths(self) -> tuple[str, ...]:
        """Torch paths of the modules outside the layers: embedding, output projection, final norm and the like."""
        family = self.architecture
        return tuple(path for path in (family.embedding, family.lm_head, *family.outer) if path)

    def projections(self, layer: int) -> tuple[Projection, ...]:
        """Return the rewritable matrices of a layer, in the order of the forward pass."""
        return self.architecture.projections(self.config, layer)

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every rewritable matrix, layer by layer in the order of the forward pass."""
        return tuple(
            self._matrix(MatrixId(index, item.path), item, cast(nn.Linear, layer.get_submodule(item.path)))
            for index, layer in enumerate(self._canonical_layers)
            for item in self.projections(index)
        )

    def _matrix(self, identity: MatrixId, item: Projection, linear: nn.Linear) -> Matrix:
        return Matrix(
            identity,
            item.role,
            (linear.out_features, linear.in_features),
            torch_path=identity.below(self.architecture.layers),
            onnx_path=f"{self.architecture.onnx_layers}.{identity.layer}.{item.onnx_path}",
        )

    def layers(self) -> Iterator[Layer]:
        """Yield the layers in canonical form, shapes only; each is the caller's own."""
        for index in range(self.layer_count):
            yield Layer(index, self.layer(index), self.heads.kv_heads)

    def layer(self, index: int) -> nn.Module:
        """Return a layer in canonical form, shapes only; it is the caller's own."""
        return copy.deepcopy(self._canonical_layers[index])

    def skeleton(self) -> PreTrainedModel:
        """Return the torch model without memory for weights, in Hugging Face's form: the caller's own."""
        return copy.deepcopy(self._empty)

    def canonical_model(self) -> PreTrainedModel:
        """Return `skeleton` with every layer in canonical form: the caller's own."""
        return copy.deepcopy(self.canonical)

    @cached_property
    def canonical(self) -> PreTrainedModel:
        """`skeleton` with every layer in canonical form, to look at: it is shared and must not change."""
        model = self.skeleton()
        for layer in model.get_submodule(self.architecture.layers).children():
            self.architecture.canonicalize(layer)
        return model

    @cached_property
    def _empty(self) -> PreTrainedModel:
        model = empty_model(self.config)
        for path in self.architecture.unused:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, None)
        return model

    @property
    def _canonical_layers(self) -> list[nn.Module]:
        return list(self.canonical.get_submodule(self.architecture.layers).children())


def describe(config: PretrainedConfig) -> ModelDescription:
    """Describe the model of a config.

    Raises:
        UnsupportedModelError: The family is unknown.
    """
    return ModelDescription(config, architecture_of(config))


def reads_types(config: PretrainedConfig) -> bool:
    """Whether the graph of a config's model takes the types of tokens."""
    return family_of(config).encoder is not None and encoder_spec(config).token_types > 1
