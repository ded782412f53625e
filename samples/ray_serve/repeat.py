"""Repeats a request whose replica died, as long as nothing of its answer was sent. Nothing here needs Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

from rk_export.errors import RkExportError

Part = TypeVar("Part")

logger = logging.getLogger(__name__)


class LostAnswerError(RkExportError):
    """An answer cannot be finished: its replica died too late to repeat the request, or too many died.

    Args:
        what: What happened.
        fix: What the client can do.
        begun: Whether something of the answer was given out.
    """

    def __init__(self, what: str, *, fix: str, begun: bool) -> None:
        super().__init__(what, fix=fix)
        self.begun = begun


@dataclass
class Repeated(Generic[Part]):
    """One answer, from the first replica that lives long enough.

    A second attempt may draw another text than the first. So the two are never mixed: once a part was given out, a
    death ends the answer.

    Args:
        attempt: Sends the request once and yields the parts of its answer. Closing it cancels the request.
        lost: The exceptions that mean that a replica is gone. Every other exception passes through.
        commits: Whether a part has to reach the client at once. Those before it are held back, and forgotten if the
            replica dies; at the end of the answer, all are given out.
        most: Attempts in all. A request that kills its replicas must not kill every one.
        pause: Seconds before the second attempt, doubled for each one after it.
    """

    attempt: Callable[[], AsyncGenerator[Part, None]]
    lost: tuple[type[BaseException], ...]
    commits: Callable[[Part], bool]
    most: int = 3
    pause: float = 0.1
    made: int = 0

    async def parts(self) -> AsyncGenerator[Part, None]:
        """Yield the parts.

        Raises:
            LostAnswerError: The replica died after a part, or every attempt lost its replica.
        """
        begun = False
        while True:
            self.made += 1
            held: list[Part] = []
            try:
                async with aclosing(self.attempt()) as parts:
                    async for part in parts:
                        held.append(part)
                        begun = begun or self.commits(part)
                        while begun and held:
                            yield held.pop(0)
                break
            except self.lost as error:
                await self._after(error, begun=begun)
        for part in held:
            yield part

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
