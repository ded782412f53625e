"""Continuous batching: many requests share one key-value buffer, and none changes the answer of another."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rk_export.runtime.engine.engine import Engine
    from rk_export.runtime.engine.records import (
        Answer,
        CancelledRequestError,
        Constraint,
        Counters,
        EngineClosedError,
        EngineFaultError,
        EngineOptions,
        Piece,
        QueueFullError,
        Request,
        TokenScore,
    )

__all__ = [
    "Answer",
    "CancelledRequestError",
    "Constraint",
    "Counters",
    "Engine",
    "EngineClosedError",
    "EngineFaultError",
    "EngineOptions",
    "Piece",
    "QueueFullError",
    "Request",
    "TokenScore",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "engine" if name == "Engine" else "records"
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
