"""A recipe by the name of a preset or from a file, with single fields set; every error says where."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rk_export.errors import InputError
from rk_export.json_codec import MisfitError, read, to_json
from rk_export.options.choices import nearest
from rk_export.options.kinds import step_kinds
from rk_export.options.ranks import BUDGET_KINDS, Budget
from rk_export.options.recipe import Recipe
from rk_export.options.step import key_of
from rk_export.options.texts import texts_beside
from rk_export.recipes.places import Path as DataPath
from rk_export.recipes.places import Places, parsed
from rk_export.recipes.presets import DEFAULT, About, about_of, presets
from rk_export.recipes.settings import Settings

_LARGEST = 100_000  # bytes; parsing takes some 10 microseconds for each


def load(name: str | Path = DEFAULT, settings: Sequence[str] = (), amount: Budget | None = None) -> Recipe:
    """Return a preset, or the recipe of a file.

    Args:
        name: Name of a preset, or path of a file.
        settings: Single fields that are set in it, such as ``quantize.bits=8``.
        amount: How much stays, instead of what it says.

    Raises:
        InputError: There is no such preset and no such file, or it is no recipe; with line and column. Or it takes
            no such amount.
    """
    file, text, folder = _found(name)
    data, places = parsed(text, file)
    made = Settings(settings)
    try:
        data = _recipe_data(data, places)
        made.apply(data)
        if amount is not None and _leaves_groups_open(data):
            data["budget"] = to_json(amount)  # without one its groups would be refused
        with texts_beside(folder):
            recipe = read(Recipe, data)
    except MisfitError as error:
        raise _refusal(error, data, places, made) from error
    return recipe if amount is None else recipe.with_budget(amount)


def _leaves_groups_open(data: dict[str, Any]) -> bool:
    """Whether a step factorize leaves it to a budget how much stays."""
    steps = data.get("steps")
    found = (
        [step.get("factorize") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    )
    amounts = ("keep", "rank", "energy")
    return any(isinstance(one, dict) and all(one.get(name) is None for name in amounts) for one in found)


def _found(name: str | Path) -> tuple[str, str, Path]:
    """Return name, text and folder of a recipe file."""
    if (preset := presets().get(str(name))) is not None:
        return f"{name}.yaml", preset.text, Path()
    path = Path(name).expanduser()
    if not os.path.isfile(path):  # it takes names that cannot be any file's
        raise InputError(
            "neither a preset nor a file",
            where=str(name),
            fix=f"{nearest(str(name), presets())}`rk-export recipes` lists the presets",
        )
    if path.stat().st_size > _LARGEST:
        raise InputError("too large for a recipe", where=str(path), fix="give a recipe file")
    try:
        return str(path), path.read_text(encoding="utf-8"), path.parent
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path), fix="give a UTF-8 file") from error


def _recipe_data(data: Any, places: Places) -> dict[str, Any]:
    """Return the data of a recipe without what it says of itself."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InputError("no recipe", where=places.of(()), fix="write `steps:` and a list below it")
    if "about" in data:
        about_of(data)
    return {key: value for key, value in data.items() if key != "about"}


def _refusal(misfit: MisfitError, data: Any, places: Places, made: Settings) -> InputError:
    """Return the error with its place in the file, or with the setting that brought it."""
    path, inside = _known_part(data, misfit.path), ""
    cause = misfit.cause
    if cause is not None and cause.where is not None:
        path = _pointed(data, path, cause.where)
        inside = cause.where
    name = inside if "." in inside or not _name(path) else _name(path)
    setting = made.at(path)
    where = f"--set {setting}" if setting is not None else places.of(made.in_file(path))
    place = f"{where}: {name}" if name else where
    if cause is not None:
        return InputError(cause.what, where=place, fix=cause.fix)
    fix = "correct it; `rk-export recipes --steps` lists all fields"
    if misfit.unknown:
        known = _known_names(path)
        fix = f"{nearest(str(path[-1]), known)}known here: {', '.join(known)}"
    return InputError(misfit.what, where=place, fix=fix)


def _known_part(data: Any, path: DataPath) -> DataPath:
    """Return the part of a path that the data have; a field that is read under another name under its own."""
    keys = {item.name: key_of(item) for kind in (*step_kinds(), About) for item in fields(kind)}
    found: list[int | str] = []
    for step in path:
        if isinstance(step, str) and isinstance(data, dict):
            step = step if step in data else keys.get(step, step)
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            is_field = (data is None or isinstance(data, dict)) and step in keys.values()
            return (*found, step) if is_field else tuple(found)
        found.append(step)
    return tuple(found)


def _pointed(data: Any, path: DataPath, where: str) -> DataPath:
    """Return the path of what a refusal names, such as ``quantize.bits``, at or below a path."""
    if path in ((), ("steps",)):
        first, *rest = where.split(".")
        steps = (data.get("steps") if isinstance(data, dict) else None) or ()
        named = [index for index, step in enumerate(steps) if isinstance(step, dict) and first in step]
        saying = [index for index in named if rest and rest[0] in (steps[index][first] or ())]
        return ("steps", (saying or named)[-1], first, *rest) if named else tuple(where.split("."))
    last = where.rpartition(".")[2]
    return path if path[-1] == last else (*path, last)


def _name(path: DataPath) -> str:
    """Return ``quantize.bits`` for ("steps", 2, "quantize", "bits")."""
    return ".".join(str(step) for step in (path[2:] if path[:1] == ("steps",) and len(path) > 2 else path))


def _known_names(path: DataPath) -> list[str]:
    """Return the names that are known beside the last one of a path."""
    kinds = {kind.name: kind for kind in step_kinds()}
    parent = path[:-1]
    if parent == ():
        return [*(item.name for item in fields(Recipe)), "about"]
    if path[-2] in ("text", "target") and len(parent) > 1:
        return ["name", "sha256"]
    if parent[0] == "steps":
        return [*kinds] if len(parent) == 2 else [key_of(item) for item in fields(kinds[str(parent[2])])]
    if parent == ("budget",):
        return [*BUDGET_KINDS, "phase"]
    if parent == ("about",):
        return [item.name for item in fields(About)]
    section = {item.name: getattr(Recipe(), item.name) for item in fields(Recipe)}[str(parent[0])]
    return [item.name for item in fields(section)]
