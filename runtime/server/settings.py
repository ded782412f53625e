"""How the server listens, whom it answers and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from rk_export.errors import InputError
from rk_export.runtime.engine.records import EngineOptions
from rk_export.runtime.providers import SessionSettings

DEFAULT_CONTEXT = 4096  # positions of a slot: the buffers of all slots are allocated at once
_SHORTEST_KEY = 8


@dataclass(frozen=True)
class ServerSettings:
    """Everything about a server but its models.

    Args:
        host: Address to listen on.
        port: TCP port; 0 takes a free one.
        session: How bundles are opened.
        engine: Slots, queue and memory of every decoder; where its capacity is None, that of a model is its context
            length, at most `DEFAULT_CONTEXT`.
        draft: A smaller bundle that guesses ahead for every decoder; None for no guesses by a model.
        keys: API keys, one of which a request must carry; empty lets everybody in.
        max_tokens: Most new tokens of one answer; None leaves it to the context.
        max_body: Most bytes of a request's body.
        timeout: Seconds that a request may take in all, and its body to arrive.
        grace: Seconds that running answers get after the first signal to end.
        cors: Origins whose pages may call the server; ``*`` is every origin.
        memory_limit: Bytes that all open models may take together; None opens every model at the start.

    Raises:
        InputError: A setting is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    session: SessionSettings = field(default_factory=SessionSettings)
    engine: EngineOptions = field(default_factory=EngineOptions)
    draft: Path | None = None
    keys: tuple[str, ...] = ()
    max_tokens: int | None = None
    max_body: int = 4_000_000
    timeout: float = 600.0
    grace: float = 30.0
    cors: tuple[str, ...] = ()
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.port < 1 << 16, "port", self.port, "give 0 (a free one) to 65535")
        _require(
            self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "give 1 or more"
        )
        _require(self.max_body >= 1 << 10, "max_body", self.max_body, "give 1024 bytes or more")
        _require(0 < self.timeout < math.inf, "timeout", self.timeout, "give seconds, more than 0")
        _require(0 <= self.grace < math.inf, "grace", self.grace, "give seconds, 0 or more")
        short = [key for key in self.keys if len(key) < _SHORTEST_KEY]
        if short:
            raise InputError(
                f"a key has {len(short[0])} characters, {_SHORTEST_KEY} are the least",
                where="keys",
                fix="make one with `openssl rand -hex 24`",
            )


def read_keys(file: Path | None, listed: str | None, *, variable: str = "list of keys") -> tuple[str, ...]:
    """Return the API keys of a file, one a line, and of a list separated by commas; ``#`` begins a comment.

    Args:
        file: Where they stand; None for no file.
        listed: The list; None where there is none.
        variable: What holds the list, for the message.

    Raises:
        InputError: The file cannot be read, or it or the list holds no key: a server that asks for none must not
            come of it.
    """
    found = [key.strip() for key in (listed or "").split(",")]
    if listed is not None and not any(found):
        raise InputError("no key in it", where=variable, fix="put keys into it, or unset it to ask for none")
    if file is not None:
        lines = _lines(file)
        if not lines:
            raise InputError("no key in it", where=str(file), fix="write one key a line")
        found += lines
    return tuple(dict.fromkeys(key for key in found if key))


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot be read: {reason}", where=str(file), fix="give a text file of keys"
        ) from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _require(holds: bool, option: str, value: object, fix: str) -> None:
    if not holds:
        raise InputError(f"{value!r} is out of range", where=option, fix=fix)
