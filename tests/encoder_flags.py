"""What sets an encoder's spec apart from a plain one, value by value, and its classifier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from rk_export.model.decoder_spec import PRE_NORM
from rk_export.model.encoder_spec import ON_SUM, EncoderSpec

# Sizes, and what is taken apart below.
_NO_FLAGS = {
    "heads",
    "layers",
    "vocab_size",
    "embedding_size",
    "hidden_size",
    "intermediate_size",
    "classifier",
}
_LAYER = ("attention_scale", "reach", "rotary", "attention_norm")


@dataclass(frozen=True)
class Flag:
    """One value, and the spec in which it is another.

    Args:
        place: Its name.
        without: The spec with another value.
    """

    place: str
    without: EncoderSpec


def flags(spec: EncoderSpec) -> Iterator[Flag]:
    """Yield every value of a spec that a plain encoder has otherwise, set to that."""
    for field in fields(spec):
        if field.name in _NO_FLAGS:
            continue
        value = getattr(spec, field.name)
        plain = _other(field.name, value) if field.default is MISSING else field.default
        if value != plain:
            yield Flag(field.name, replace(spec, **{field.name: plain}))
    if spec.positions is not None:
        other = 0 if spec.positions.padding is None else None
        positions = replace(spec.positions, padding=other)
        yield Flag("positions.padding", replace(spec, positions=positions))
    yield from _of_the_layers(spec)
    yield from _of_the_classifier(spec)


def _other(name: str, value: Any) -> Any:
    others = {
        "activation": "relu" if value != "relu" else "gelu",
        "gated_mlp": not value,
        "norm": "rms" if value != "rms" else "layer",
        "norm_names": PRE_NORM if value != PRE_NORM else ON_SUM,
        "norm_on_sum": not value,
        "norm_epsilon": 0.1,
    }
    return others[name]


def _of_the_layers(spec: EncoderSpec) -> Iterator[Flag]:
    others = {"attention_scale": 1.0, "reach": None, "rotary": None, "attention_norm": True}
    for name in _LAYER:
        if any(getattr(layer, name) != others[name] for layer in spec.layers):
            layers = tuple(replace(layer, **{name: others[name]}) for layer in spec.layers)
            yield Flag(f"layers.{name}", replace(spec, layers=layers))
    if len({layer.rotary for layer in spec.layers}) > 1:
        one = tuple(replace(layer, rotary=spec.layers[0].rotary) for layer in spec.layers)
        yield Flag("layers.rotary by layer", replace(spec, layers=one))


def _of_the_classifier(spec: EncoderSpec) -> Iterator[Flag]:
    head = spec.classifier
    if head is None:
        return
    others: dict[str, Any] = {"norm": False}
    if head.activation:
        others["activation"] = "relu" if head.activation != "relu" else "tanh"
    if not head.by_token:
        others["pooling"] = "mean" if head.pooling == "first" else "first"
    for name, other in others.items():
        if getattr(head, name) != other:
            yield Flag(f"classifier.{name}", replace(spec, classifier=replace(head, **{name: other})))
