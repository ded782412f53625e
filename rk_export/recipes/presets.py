"""The recipes that come with rk-export: one file each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from rk_export.json_codec import MisfitError, read
from rk_export.recipes.places import parsed

# What `compress` does where no recipe is named.
DEFAULT = "default"
_FOLDER = files("rk_export.recipes") / "presets"


@dataclass(frozen=True)
class About:
    """What a recipe is for.

    Args:
        does: What it does, in one sentence.
        when: When to take it.
        paper: The arXiv number of the method, if it is a published one.
    """

    does: str
    when: str
    paper: str | None = None


@dataclass(frozen=True)
class Preset:
    """One preset.

    Args:
        name: Its name.
        text: Its file.
        about: What it is for.
    """

    name: str
    text: str
    about: About


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets, the default first."""
    names = sorted(
        entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml")
    )
    return (DEFAULT, *(name for name in names if name != DEFAULT))


@cache
def presets() -> dict[str, Preset]:
    """Return all presets by name, the default first."""
    return {name: _preset(name) for name in preset_names()}


def _preset(name: str) -> Preset:
    text = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    data, _ = parsed(text, f"{name}.yaml")
    return Preset(name, text, about_of(data))


def about_of(data: Any) -> About:
    """Return what a recipe file says of itself.

    Raises:
        MisfitError: It says something else than `About`.
    """
    try:
        return read(About, data["about"])
    except MisfitError as error:
        raise MisfitError(
            ("about", *error.path), error.what, unknown=error.unknown, cause=error.cause
        ) from error
