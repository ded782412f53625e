"""What a test must know of a model family: one frozen entry, from which its tiny random models are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel

SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class TinyFamily:
    """A family as the tests know it. Its values should make each of its features change the logits visibly.

    That takes windows of 5 to 8 tokens, an ``original_max_position_embeddings`` of 8, clips and caps that act, scales
    that are not 1, and heads whose width is not ``hidden_size / heads``. The weights are random, norm gains and biases
    included.

    Args:
        name: What the tests call it.
        model_type: ``config.model_type``; empty = the name.
        fields: Fields of its config beside `SIZES`, and those of `SIZES` with other values.
        spelled: A field of `SIZES` -> how this family's config spells it; None = it has none.
        variants: Further models of the family, by name: the fields in which they differ. Each is tested as
            ``NAME:VARIANT``.
        known: Models that people know it by, the best known first.
        is_encoder: Built by ``AutoModel`` and exported as an encoder.
        in_sample: Also one of ``FAMILIES``, over which the tests of all packages run; for a few with many features.
        finish: Gives a built model what random weights do not; in place.
    """

    name: str
    model_type: str = ""
    fields: Fields = field(default_factory=dict)
    spelled: Mapping[str, str | None] = field(default_factory=dict)
    variants: Mapping[str, Fields] = field(default_factory=dict)
    known: tuple[str, ...] = ()
    is_encoder: bool = False
    in_sample: bool = False
    finish: Callable[[PreTrainedModel], None] | None = None

    def config_fields(self, variant: str = "") -> dict[str, Any]:
        """Return the fields of a tiny config, in the family's own spelling.

        Raises:
            KeyError: The family has no such variant.
        """
        changed = {**self.fields, **(self.variants[variant] if variant else {})}
        spelled = {self.spelled.get(name, name): value for name, value in SIZES.items()}
        spelled.pop(None, None)
        return {str(name): value for name, value in {**spelled, **changed}.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The family and its variants, as tests name them."""
        return (self.name, *(f"{self.name}:{variant}" for variant in self.variants))
