"""What tells the tensors of two classes of models apart, in few words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

NAMED = 4  # of many differences


def differences(here: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return what tells the tensors of an unknown class from those of a family's, alike layers once."""
    lines = [f"no {name}" for name in once(there.keys() - here.keys())]
    lines += [f"beside it {name}" for name in once(here.keys() - there.keys())]
    lines += [
        f"{name} of shape {list(here[name])} instead of {list(there[name])}"
        for name in once(name for name in here.keys() & there.keys() if here[name] != there[name])
    ]
    return lines


def once(names: Iterable[str]) -> list[str]:
    """Return names of the first layer that has them, others as they are."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        seen.setdefault(pattern(name), name)
    return list(seen.values())


def pattern(name: str) -> str:
    """Return a name without the numbers of layers and experts."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def listed(lines: list[str]) -> str:
    """Return the first of some differences, and how many more there are."""
    more = f" and {len(lines) - NAMED} more" if lines[NAMED:] else ""
    return f"{', '.join(lines[:NAMED])}{more}"
