"""How the served bundle is to run, read from the parameters in config.pbtxt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rk_export.errors import InputError
from rk_export.runtime.engine.records import EngineOptions
from rk_export.runtime.providers import SessionSettings

_SESSION = ("threads", "max_length")
_ENGINE = ("slots", "queue", "chunk", "capacity", "kept_prefixes")
_NAMES = ("provider", *_SESSION, *_ENGINE)


@dataclass(frozen=True)
class ServedSettings:
    """How the session and its engine are opened.

    Args:
        session: Provider and threads.
        max_length: Most positions of prompt and answer together; None takes the model's context length.
        engine: Slots, queue and what else the engine takes.
    """

    session: SessionSettings
    max_length: int | None
    engine: EngineOptions

    @classmethod
    def read(cls, parameters: Mapping[str, Any]) -> ServedSettings:
        """Read ``parameters`` of the model configuration, as Triton gives them in JSON.

        Raises:
            InputError: A parameter is unknown, no number or out of its range. Names in capitals are Triton's own.
        """
        values = {name: str(entry.get("string_value", "")) for name, entry in parameters.items()}
        unknown = sorted(name for name in values if name not in _NAMES and not name.isupper())
        if unknown:
            raise InputError(
                "there is no such parameter", where=unknown[0], fix=f"give some of {', '.join(_NAMES)}"
            )
        numbers: dict[str, Any] = {
            name: _number(name, values[name]) for name in (*_SESSION, *_ENGINE) if name in values
        }
        provider: Any = values.get("provider", "auto")
        return cls(
            SessionSettings(provider, numbers.get("threads")),
            numbers.get("max_length"),
            EngineOptions(**{name: numbers[name] for name in _ENGINE if name in numbers}),
        )


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{text!r} is no whole number", where=name, fix="give a number of digits alone")
    return int(text)
