"""Single fields of a recipe that are set from the command line: ``cap.keep=0.4``."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from rk_export.errors import InputError
from rk_export.options.choices import nearest
from rk_export.options.recipe import Recipe
from rk_export.options.step import STAGES, Step, step_kinds
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

    def apply(self, data: dict[str, Any]) -> None:
        """Set the fields in the data of a recipe file; a step that is not there is added where its stage belongs.

        Raises:
            InputError: There is no such step or section, or not so many steps of a name.
        """
        for setting in self._settings:
            path = self._path(data, setting)
            if path in self._places:
                raise InputError("is given twice", where=f"--set {setting.text}", fix="drop one of the two")
            *above, last = path
            holder: Any = data
            for key in above:
                if isinstance(holder, dict) and not isinstance(holder.get(key), (dict, list)):
                    holder[key] = {}
                holder = holder[key]
            if setting.head == "budget" and setting.field != "phase":
                kept = {"phase": holder["phase"]} if "phase" in holder and setting.field == "speed_up" else {}
                holder.clear()
                holder.update(kept)
            holder[last] = setting.value
            self._places[path] = setting.text

    def at(self, path: Path) -> str | None:
        """Return the setting that put a value there, or below or above it; None where none did."""
        for place, text in self._places.items():
            if place == path or place == path[: len(place)]:
                return text
        return next(
            (text for place, text in self._places.items() if path and path == place[: len(path)]), None
        )

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
            return ("steps",)
        index = _index(steps, kinds[setting.head], setting)
        return ("steps", index, setting.head, *below)


def _index(steps: list[Any], kind: type[Step], setting: _Setting) -> int:
    """Return which step of a recipe a setting means; a missing one is added."""
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
    if own:
        return own[setting.number or 0]
    later = STAGES.index(kind.stage)
    stages = {one.name: STAGES.index(one.stage) for one in step_kinds()}
    before = [
        index
        for index, step in enumerate(steps)
        if isinstance(step, dict) and any(stages.get(name, later) <= later for name in step)
    ]
    place = before[-1] + 1 if before else 0
    steps.insert(place, {kind.name: {}})
    logger.info("--set %s: adds the step %s", setting.text, kind.name)
    return place


def _parsed(text: str) -> _Setting:
    where = f"--set {text}"
    match = re.fullmatch(r"([\w-]+)(?:\[(\d+)\])?(?:\.(\w+))?=(.*)", text, re.DOTALL)
    if match is None:
        raise InputError("no setting", where=where, fix="write STEP.FIELD=VALUE, such as --set cap.keep=0.4")
    head, number, name, value = match.groups()
    return _Setting(text, head, None if number is None else int(number), name or "", scalar(value, where))
