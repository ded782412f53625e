"""What sets a decoder's spec apart from that of a plain Llama of the same sizes, value by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from typing import Any

from rk_export.model.decoder_spec import DecoderSpec, LayerSpec

# Sizes, and what a Llama has of its own: no other value of these would be the plain one.
_NO_FLAGS = {"heads", "layers", "vocab_size", "hidden_size", "intermediate_size", "norm_epsilon", "tied"}
_PLAIN: dict[str, Any] = {"activation": "silu"}


@dataclass(frozen=True)
class Flag:
    """One value that is not a Llama's.

    Args:
        place: Its name; ``layers.NAME`` for one that layers have.
        without: Returns a spec in which it is a Llama's.
    """

    place: str
    without: Callable[[DecoderSpec], DecoderSpec]


def flags(spec: DecoderSpec) -> list[Flag]:
    """Return everything in a spec that a plain Llama has otherwise."""
    return [*_of_the_decoder(spec), *_of_the_layers(spec)]


def _of_the_decoder(spec: DecoderSpec) -> list[Flag]:
    found = []
    for field in fields(spec):
        if field.name in _NO_FLAGS:
            continue
        plain = _PLAIN.get(field.name, _default(field))
        if getattr(spec, field.name) != plain:
            found.append(Flag(field.name, _set_back({field.name: plain})))
            found += _of_a_part(field.name, getattr(spec, field.name), plain)
    return found


def _of_a_part(name: str, value: Any, plain: Any) -> list[Flag]:
    """Return the flags in a value that has fields of its own, such as what a mixture does besides choosing."""
    if not is_dataclass(value) or (plain is not None and type(value) is not type(plain)):
        return []
    return [Flag(f"{name}.{place}", _set_back({name: other})) for place, other in _others(value, plain)]


def _others(value: Any, plain: Any) -> Iterator[tuple[str, Any]]:
    """Yield copies of a value, each with one field set back, and the name of the field."""
    for field in fields(value):
        current = getattr(value, field.name)
        other = _default(field) if plain is None else getattr(plain, field.name)
        if other is not MISSING:
            if current != other:
                yield field.name, replace(value, **{field.name: other})
        elif is_dataclass(current):
            for place, changed in _others(current, None):
                yield f"{field.name}.{place}", replace(value, **{field.name: changed})
        elif isinstance(current, (bool, int, float)):  # nothing is the plain one, so another must show
            yield field.name, replace(value, **{field.name: _another(current)})


def _another(number: float) -> float:
    if isinstance(number, bool):
        return not number
    return number - 1 if isinstance(number, int) else number + 1.0


def _of_the_layers(spec: DecoderSpec) -> list[Flag]:
    plain = _plain_layer(spec)
    found = []
    for field in fields(LayerSpec):
        value = getattr(plain, field.name)
        if any(getattr(layer, field.name) != value for layer in spec.layers):
            layers = tuple(replace(layer, **{field.name: value}) for layer in spec.layers)
            found.append(Flag(f"layers.{field.name}", _set_back({"layers": layers})))
    return found


def _plain_layer(spec: DecoderSpec) -> LayerSpec:
    """Return a layer of a Llama with the heads of a spec, and the rotation that most of its layers have."""
    rotations = [layer.rotary for layer in spec.layers if layer.rotary is not None]
    rotation = max(set(rotations), key=rotations.count) if rotations else None
    required = {
        "attention_scale": spec.heads.head_dim**-0.5,
        "window": None,
        "rotary": rotation,
        "has_experts": False,
    }
    return LayerSpec(**required)


def _set_back(changed: dict[str, Any]) -> Callable[[DecoderSpec], DecoderSpec]:
    return lambda spec: replace(spec, **changed)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
