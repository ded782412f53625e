"""A decoder that gives its hidden states, such as Qwen3-Embedding, as an encoder: the same layers, no cache."""

from __future__ import annotations

from dataclasses import fields

from rk_export.errors import UnsupportedModelError
from rk_export.model.decoder_spec import DecoderSpec, LayerSpec
from rk_export.model.encoder_spec import EncoderLayerSpec, EncoderSpec

# What the encoder has too; those of logits are of no account without an output projection.
_TAKEN = (
    "heads",
    "layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "activation",
    "norm",
    "norm_epsilon",
    "gated_mlp",
    "norm_names",
    "query_key_norm",
    "embedding_scale",
)
_OF_LOGITS = ("tied", "logit_scale", "logit_softcap")


def as_encoder(spec: DecoderSpec, *, causal: bool) -> EncoderSpec:
    """Return what a decoder without its output projection computes.

    Args:
        spec: Of the decoder.
        causal: A token sees those before it only.

    Raises:
        UnsupportedModelError: The decoder has something that the encoder's graph lacks.
    """
    for item in fields(spec):
        value = getattr(spec, item.name)
        if item.name not in (*_TAKEN, *_OF_LOGITS) and value != item.default:
            raise UnsupportedModelError(
                f"an embedding model with {item.name} {value!r}: the exported encoder does not have it",
                where="config.json",
                fix="use an embedding model of the families llama, mistral, qwen2, qwen3 or gemma3_text",
            )
    taken = {name: getattr(spec, name) for name in _TAKEN if name != "layers"}
    return EncoderSpec(
        **taken,
        layers=tuple(map(_layer, spec.layers)),
        embedding_size=spec.hidden_size,
        norm_on_sum=False,
        causal=causal,
        final_norm=True,
    )


def _layer(layer: LayerSpec) -> EncoderLayerSpec:
    if layer.has_experts:
        raise UnsupportedModelError(
            "an embedding model with experts: the exported encoder has none", where="config.json"
        )
    # A window counts the query's own position.
    reach = None if layer.window is None else layer.window - 1
    return EncoderLayerSpec(layer.attention_scale, reach, layer.rotary)
