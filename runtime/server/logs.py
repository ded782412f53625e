"""The log: one line of JSON an event, without prompts and answers."""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar

# Id of the request that is being answered; empty outside of one.
request_id: ContextVar[str] = ContextVar("request_id", default="")

logger = logging.getLogger("rk_export.server")


class JsonFormatter(logging.Formatter):
    """Writes a record, and the fields that it carries, as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identity := request_id.get():
            line["request_id"] = identity
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def event(message: str, level: int = logging.INFO, **fields: object) -> None:
    """Log an event with its fields."""
    logger.log(level, message, extra={"fields": fields})


def log_as_json() -> None:
    """Let every handler of the root logger write JSON."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter())
