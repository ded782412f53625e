"""Every field of a family's config, and other values for each: what a config.json of that family may say."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    cache_utils,
    masking_utils,
    modeling_rope_utils,
)
from transformers.activations import ACT2FN

# What the code of a family asks its config for, declared or not, and what its config class takes besides its fields.
_READ = re.compile(r"""\bconfig\.([a-z_]\w*)\b(?!\s*\()|getattr\((?:self\.)?config,\s*["'](\w+)["']""")
_TAKEN = re.compile(r"""kwargs\.(?:pop|get|setdefault)\(\s*["'](\w+)["']""")
_LITERAL = re.compile(r"""["']([a-z_0-9-]+)["']""")
# Of the classes of all models: where they came from, and what each is called with.
_NO_FIELDS = {
    *("model_type", "transformers_version", "architectures", "name_or_path", "_name_or_path", "auto_map"),
    *("_attn_implementation", "_attn_implementation_internal", "_experts_implementation", "attribute_map"),
    *("sub_configs", "keys_to_ignore_at_inference", "base_config_key", "rope_scaling", "rope_theta"),
}
_UNKNOWN: tuple[Any, ...] = (False, True, 5, 0.5)
# Code of all families that reads configs too.
_SHARED = (cache_utils, masking_utils, modeling_rope_utils)
# Values that nothing in a config points to.
_MORE: dict[str, tuple[Any, ...]] = {
    "dtype": ("bfloat16",),
    "position_embedding_type": ("relative_key", "relative_key_query", "alibi", "rope", "nope"),
    "layer_types": (["full_attention"] * 4, ["sliding_attention"] * 4, ["full_attention"] * 2),
    "rope_parameters": (),
}
_SCALED: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 8},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 8},
}


@dataclass(frozen=True)
class Change:
    """Another value in a config.json.

    Args:
        field: The field at the top of the file.
        place: The place of the value, such as ``rope_parameters.factor``.
        value: What the file says for the whole field.
        shown: The value at the place.
    """

    field: str
    place: str
    value: Any
    shown: Any

    def __str__(self) -> str:
        return f"{self.place}={self.shown!r}"

    @property
    def names(self) -> tuple[str, ...]:
        """Any of these in a message names what was changed."""
        new = {"rope_scaling": "rope_parameters", "rope_theta": "rope_parameters"}.get(self.field, self.field)
        return (self.field, new, self.place.rpartition(".")[2])


def changes(config: PretrainedConfig, model: PreTrainedModel) -> Iterator[Change]:
    """Yield every change of a family's config, one value each.

    Args:
        config: That of a tiny model.
        model: The model, to find its code by.
    """
    own = (sys.modules[type(item).__module__] for item in (config, model))
    sources = [inspect.getsource(module) for module in (*own, *_SHARED)]
    declared = {item.name for item in fields(config)} | config.to_dict().keys()
    read = {name for source in sources for found in _READ.findall(source) for name in found if name}
    taken = {name for source in sources for name in _TAKEN.findall(source)}
    for name in sorted((declared | read | taken) - _NO_FIELDS):
        if name.startswith("__") or callable(getattr(config, name, None)):
            continue
        current = getattr(config, name, None)
        literals = _literals(config, name, sources)
        if isinstance(current, PretrainedConfig):  # a part of the config
            current = {item.name: getattr(current, item.name) for item in fields(current)}
        yield from _other(name, name, current, literals)
    yield from _scalings(config)


def _other(field: str, place: str, current: Any, literals: tuple[str, ...]) -> Iterator[Change]:
    """Yield other values of a field in place of the current one."""
    if isinstance(current, dict):
        for key in current:
            yield from _inside(field, place, current, key)
    for value in _values(field, current, literals):
        if type(value) is not type(current) or value != current:
            yield Change(field, place, value, value)


def _inside(field: str, place: str, current: dict[Any, Any], key: Any) -> Iterator[Change]:
    if field in ("id2label", "label2id") or key == "rope_type":
        return
    for change in _other(field, f"{place}.{key}", current[key], ()):
        yield Change(field, change.place, {**current, key: change.value}, change.shown)


def _values(field: str, current: Any, literals: tuple[str, ...]) -> Iterator[Any]:
    yield from _MORE.get(field, ())
    if current is None:
        yield from (*_UNKNOWN, *literals)
        return
    yield None
    if isinstance(current, bool):
        yield not current
    elif isinstance(current, int):
        yield from (2 * current, current // 2, current + 1, 0, 1)
    elif isinstance(current, float):
        yield from (1.5 * current, 0.5, 2.0, 0.0)
    elif isinstance(current, str):
        yield from (*(ACT2FN if current in ACT2FN else ()), *literals, "something else")
    elif isinstance(current, (list, tuple)):
        yield from _sequences(list(current))


def _sequences(current: list[Any]) -> Iterator[list[Any]]:
    yield from ([], current[::-1], current[1:] + current[:1])
    for value in {repr(item): item for item in current}.values():
        yield [value] * len(current)
    if current and all(isinstance(item, (int, bool)) for item in current):
        yield [int(not item) for item in current]


def _literals(config: PretrainedConfig, name: str, sources: list[str]) -> tuple[str, ...]:
    """Return strings that the type of a field allows, or that stand in lines of the code beside its name."""
    stated = [str(item.type) for item in fields(config) if item.name == name]
    found = {value for hint in stated for value in _LITERAL.findall(hint)}
    for source in sources:
        for line in source.splitlines():
            code = line.partition("#")[0]
            if re.search(rf"\.{name}\s*(==|!=|in\b|not in\b)", code):
                found |= set(_LITERAL.findall(code))
    return tuple(sorted(found - {name}))


def _scalings(config: PretrainedConfig) -> Iterator[Change]:
    """Yield every kind of rotary scaling, as new and as old files spell it."""
    current = getattr(config, "rope_parameters", None)
    yield Change("rope_theta", "rope_theta", 100.0, 100.0)
    if not isinstance(current, dict):
        return
    width = _rotated(config)
    for name in sorted({*_SCALED, *modeling_rope_utils.ROPE_INIT_FUNCTIONS}):
        scaling: dict[str, Any] = {"rope_type": name, **_SCALED.get(name, {"factor": 2.0})}
        if name == "longrope":
            scaling |= {"short_factor": [1.0] * (width // 2), "long_factor": [2.0] * (width // 2)}
        for spelling in ("type", "rope_type"):
            old = {spelling: name, **{key: value for key, value in scaling.items() if key != "rope_type"}}
            yield Change("rope_scaling", f"rope_scaling.{spelling}", old, name)
        if "rope_type" in current:
            yield Change("rope_parameters", "rope_parameters.rope_type", {**current, **scaling}, name)
            continue
        for layer_type, parameters in current.items():
            changed = {**current, layer_type: {**(parameters or {}), **scaling}}
            yield Change("rope_parameters", f"rope_parameters.{layer_type}.rope_type", changed, name)


def _rotated(config: PretrainedConfig) -> int:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(width * (getattr(config, "partial_rotary_factor", None) or 1.0))
