"""What a client is told when a request ends without an answer: no path and no stack trace leaves the server."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Literal

from rk_export.errors import InputError, RkExportError
from rk_export.runtime.engine.records import EngineClosedError, QueueFullError

logger = logging.getLogger(__name__)

Kind = Literal["INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"]


@dataclass(frozen=True)
class Refusal:
    """Why a request has no answer.

    Args:
        kind: The status, by its name in Triton.
        message: What the client reads.
    """

    kind: Kind
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Refusal:
        """Return what a client may know of an error; what it may not know goes to the log."""
        if isinstance(error, (QueueFullError, EngineClosedError)):
            return cls("UNAVAILABLE", _told(error))
        if isinstance(error, InputError):
            return cls("INVALID_ARG", _told(error))
        logger.error("a request failed", exc_info=error)
        return cls("INTERNAL", "the server could not answer; its log says why")


CANCELLED = Refusal("CANCELLED", "the request was cancelled")


def _told(error: RkExportError) -> str:
    where = error.where if error.where is not None and os.sep not in error.where else None
    return str(RkExportError(error.what, where=where, fix=error.fix))
