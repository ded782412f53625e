"""Single fields of a recipe that are set from the command line: ``quantize.bits=8``."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from rk_export.errors import InputError
from rk_export.json_codec import MisfitError
from rk_export.options.choices import nearest
from rk_export.options.kinds import step_kinds
from rk_export.options.recipe import Recipe
from rk_export.options.step import STAGES, Step
from rk_export.recipes.places import Path, scalar

logger = logging.getLogger(__name__)

_SECTIONS = tuple(item.name for item in fields(Recipe) if item.name != "steps")


@dataclass(frozen=True)
class _Setting:
    """One setting, as it was written."""

    text: str
    head: str
    number: int | None
    field: str
    value: Any


class Settings:
    """Settings of one recipe, and where they went.

    Args:
        texts: Each ``STEP.FIELD=VALUE``, ``STEP=VALUE``, ``STEP[N].FIELD=VALUE``, or the same of calibration, budget
            or target. The value is YAML: a number, a name, a list in brackets, or null.

    Raises:
        InputError: One of them is none, or is given twice.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._settings = [_parsed(text) for text in texts]
        self._places: dict[Path, str] = {}
        self._added: list[int] = []

    def apply(self, data: dict[str, Any]) -> None:
        """Set the fields in the data of a recipe file; a step that is not there is added where its stage belongs.

        Raises:
            InputError: There is no such step or section, or not so many steps of a name.
            MisfitError: The file's steps are no list.
        """
        for setting in self._settings:
            path = self._path(data, setting)
            if any(place[: len(path)] == path for place in self._places):
                raise InputError("is given twice", where=f"--set {setting.text}", fix="drop one of the two")
            *above, last = path
            holder: Any = data
            for key in above:
                if isinstance(holder, dict) and key != "steps" and not isinstance(holder.get(key), dict):
                    holder[key] = {}
                holder = holder[key]
            if setting.head == "budget" and setting.field not in ("", "phase"):
                self._clear_budget(holder, setting)
            holder[last] = setting.value
            self._places[path] = setting.text

    def _clear_budget(self, budget: dict[str, Any], setting: _Setting) -> None:
        """Drop the amount that another one takes the place of."""
        own = [text for place, text in self._places.items() if place[0] == "budget" and place[-1] != "phase"]
        if own:
            raise InputError(
                f"{own[0]} is a budget already", where=f"--set {setting.text}", fix="drop one of the two"
            )
        for name in [name for name in budget if name != "phase" or setting.field != "speed_up"]:
            del budget[name]

    def at(self, path: Path) -> str | None:
        """Return the setting that put a value there, or below or above it, or added its step; None where none did."""
        for place, text in self._places.items():
            if place == path[: len(place)] or (path and path == place[: len(path)]):
                return text
        is_added = len(path) > 1 and path[0] == "steps" and path[1] in self._added
        return next(
            (text for place, text in self._places.items() if is_added and place[:2] == path[:2]), None
        )

    def in_file(self, path: Path) -> Path:
        """Return the path that a value has in the file, where no step was added."""
        if len(path) < 2 or path[0] != "steps" or not isinstance(path[1], int):
            return path
        return ("steps", path[1] - sum(index < path[1] for index in self._added), *path[2:])

    def _add(self, steps: list[Any], index: int, name: str) -> None:
        """Add an empty step; what is known of later steps moves on with them."""

        def moved(path: Path) -> Path:
            after = path[0] == "steps" and len(path) > 1 and isinstance(path[1], int) and path[1] >= index
            return ("steps", int(path[1]) + 1, *path[2:]) if after else path

        steps.insert(index, {name: {}})
        self._places = {moved(path): text for path, text in self._places.items()}
        self._added = [*(added + (added >= index) for added in self._added), index]

    def _path(self, data: dict[str, Any], setting: _Setting) -> Path:
        below = (setting.field,) if setting.field else ()
        if setting.head in _SECTIONS:
            return (setting.head, *below)
        kinds = {kind.name: kind for kind in step_kinds()}
        if setting.head not in kinds:
            known = (*kinds, *_SECTIONS)
            raise InputError(
                f"there is no step {setting.head!r}",
                where=f"--set {setting.text}",
                fix=f"{nearest(setting.head, known)}known: {', '.join(known)}",
            )
        steps = data.setdefault("steps", [])
        if not isinstance(steps, list):
            raise MisfitError(("steps",), f"expected a list of steps; found {reprlib.repr(steps)}")
        index = _index(steps, kinds[setting.head], setting)
        if index is None:
            index = _place(steps, kinds[setting.head])
            self._add(steps, index, setting.head)
            logger.info("--set %s: adds the step %s", setting.text, setting.head)
        return ("steps", index, setting.head, *below)


def _index(steps: list[Any], kind: type[Step], setting: _Setting) -> int | None:
    """Return which step of a recipe a setting means; None where there is none of its name."""
    own = [index for index, step in enumerate(steps) if isinstance(step, dict) and kind.name in step]
    if setting.number is not None and setting.number >= len(own):
        raise InputError(
            f"the recipe has {len(own)} steps {kind.name}",
            where=f"--set {setting.text}",
            fix="count from 0, or drop the number",
        )
    if own and len(own) > 1 and setting.number is None:
        logger.info(
            "--set %s: the first of %d steps %s; %s[1] is the next",
            setting.text,
            len(own),
            kind.name,
            kind.name,
        )
    return own[setting.number or 0] if own else None


def _place(steps: list[Any], kind: type[Step]) -> int:
    """Return where a step belongs by its stage."""
    later = STAGES.index(kind.stage)
    stages = {one.name: STAGES.index(one.stage) for one in step_kinds()}
    before = [
        index
        for index, step in enumerate(steps)
        if isinstance(step, dict) and any(stages.get(name, later) <= later for name in step)
    ]
    return before[-1] + 1 if before else 0


def _parsed(text: str) -> _Setting:
    where = f"--set {text}"
    match = re.fullmatch(r"([\w-]+)(?:\[(\d+)\])?(?:\.(\w+))?=(.*)", text, re.DOTALL)
    if match is None:
        raise InputError(
            "no setting", where=where, fix="write STEP.FIELD=VALUE, such as --set quantize.bits=8"
        )
    head, number, name, value = match.groups()
    return _Setting(text, head, None if number is None else int(number), name or "", scalar(value, where))
