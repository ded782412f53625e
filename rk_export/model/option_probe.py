"""The options of two classes that compute the same: whether they follow each change of a number alike."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig

from rk_export.model.class_probe import SAME, Tiny, difference, situations
from rk_export.model.tiny_version import changed, random_model

NO_OPTIONS = frozenset({"model_type", "architectures", "transformers_version", "dtype", "auto_map"})


def options(
    tiny: Tiny, as_family: Callable[[PretrainedConfig], PretrainedConfig]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Change every number in a config; return the options without effect that it states, and those that may act.

    An option may do nothing to these weights and act on others, such as a clip at a large value. So both classes must
    follow a change of it alike. One that the family does not have must be zero or one, where it acts on no weights.
    """
    idle, active = [], []
    stated, read = tiny.config.to_diff_dict(), as_family(tiny.config)
    for name, value in sorted(tiny.config.to_dict().items()):
        if name in NO_OPTIONS or name.startswith("_") or name.endswith("token_id"):
            continue
        is_foreign = not hasattr(read, name)
        if not (is_foreign and value in (0, 1)) and _parts_ways(tiny, as_family, name, value):
            active.append(f"{name}={value!r}")
        elif is_foreign and name in stated and value not in (None, 0, 1):
            idle.append(f"{name}={value!r}")
    return tuple(idle), tuple(active)


def _parts_ways(
    tiny: Tiny, as_family: Callable[[PretrainedConfig], PretrainedConfig], name: str, value: object
) -> bool:
    """Whether the two classes compute different things once a number has another value.

    A number that changes the tensors was compared with them already.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return any(_part_at(tiny, as_family, name, other) for other in _others(value))


def _others(value: int | float) -> tuple[int | float, ...]:
    """Return other values of a number: such as make a threshold act, and such as are near."""
    if isinstance(value, float):
        return 0.5 if value != 0.5 else 0.25, value + 0.5
    return (3 if value != 3 else 5,)


def _part_at(
    tiny: Tiny, as_family: Callable[[PretrainedConfig], PretrainedConfig], name: str, other: object
) -> bool:
    try:
        config = changed(tiny.config, **{name: other})
        expected = situations(random_model(config, tiny.weights))
    except Exception:
        return False
    try:
        found = situations(random_model(as_family(config), tiny.weights))
    except Exception:
        return True
    return difference(found, expected) > SAME
