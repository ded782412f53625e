"""Repeats a request whose replica died, as long as nothing of its answer was sent. Nothing here needs Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

from rk_export.errors import RkExportError

Event = TypeVar("Event")

logger = logging.getLogger(__name__)


class LostAnswerError(RkExportError):
    """An answer cannot be finished: its replica died too late to repeat the request, or too many died.

    Args:
        what: What happened.
        fix: What the client can do.
        begun: Whether something of the answer was sent.
    """

    def __init__(self, what: str, *, fix: str, begun: bool) -> None:
        super().__init__(what, fix=fix)
        self.begun = begun


@dataclass
class Repeated(Generic[Event]):
    """The events of one answer, from the first replica that lives long enough.

    A second attempt may draw another text than the first. So the two are never mixed: once an event was given out, a
    loss ends the answer.

    Args:
        attempt: Sends the request once and yields what comes back. Closing it cancels the request.
        lost: The exceptions that mean that a replica is gone. Every other exception passes through.
        most: Attempts in all. A request that kills its replicas must not kill every one.
        pause: Seconds before the second attempt, doubled for each one after it.
    """

    attempt: Callable[[], AsyncGenerator[Event, None]]
    lost: tuple[type[BaseException], ...]
    most: int = 3
    pause: float = 0.1
    made: int = 0

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield the events.

        Raises:
            LostAnswerError: The replica died after an event, or every attempt lost its replica.
        """
        begun = False
        while not begun:
            self.made += 1
            try:
                async with aclosing(self.attempt()) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except self.lost as error:
                await self._after(error, begun=begun)

    async def _after(self, error: BaseException, *, begun: bool) -> None:
        """Wait until the request may be sent again, or say that it may not."""
        logger.warning("attempt %d of %d lost its replica: %s", self.made, self.most, type(error).__name__)
        if begun:
            raise LostAnswerError(
                "the replica that wrote this answer was lost",
                fix="discard the text so far, and send the request again",
                begun=True,
            ) from error
        if self.made >= self.most:
            raise LostAnswerError(
                f"{self.made} replicas were lost, one after another",
                fix="send the request again later",
                begun=False,
            ) from error
        await asyncio.sleep(self.pause * 2 ** (self.made - 1))
