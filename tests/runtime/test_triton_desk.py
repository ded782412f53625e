"""Requests at the desk: every client gets its own pieces and one end, whatever the engine and the others do."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rk_export.errors import InputError, RkExportError
from rk_export.runtime import FinishReason
from rk_export.runtime.engine.records import Answer, EngineClosedError, Piece, QueueFullError, Request
from rk_export.runtime.triton.desk import Desk
from rk_export.runtime.triton.refusal import CANCELLED, Refusal

WITHIN = 10  # seconds until what must happen has happened


class Taken:
    """A request that the double of the engine took."""

    def __init__(self, request: Request, listener: Callable[[Any], None]) -> None:
        self.request, self.say = request, listener
        self.cancelled: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def cancel(self) -> None:
        self.cancelled.put(True)


class EngineDouble:
    """Takes requests, and leaves it to the test to answer them."""

    def __init__(self) -> None:
        codec = SimpleNamespace(encode=lambda text: list(text.encode()))
        self.session = SimpleNamespace(text_codec=codec)
        self.taken: list[Taken] = []
        self.refusal: Exception | None = None

    def submit(self, request: Request, listener: Callable[[Any], None]) -> Taken:
        if self.refusal is not None:
            raise self.refusal
        self.taken.append(Taken(request, listener))
        return self.taken[-1]

    def close(self, *, finish: bool) -> None:
        assert not finish
        for taken in self.taken:
            taken.say(EngineClosedError("the engine was closed", where="engine"))


class Client:
    """A wire that keeps what comes."""

    def __init__(self) -> None:
        self.left = self.broken = self.lost = False
        self._got: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def piece(self, text: str) -> None:
        if self.broken:
            raise OSError("broken pipe")
        self._got.put(text)

    def answer(self, text: str, answer: Answer) -> None:
        self._got.put((text, answer))

    def refuse(self, refusal: Refusal) -> None:
        self._got.put(refusal)

    def cancelled(self) -> bool:
        if self.lost:
            raise OSError("no such request")
        return self.left

    def next(self) -> Any:
        return self._got.get(timeout=WITHIN)

    def nothing_more(self) -> bool:
        return self._got.empty()


@pytest.fixture
def engine() -> EngineDouble:
    return EngineDouble()


@pytest.fixture
def desk(engine: EngineDouble) -> Iterator[Desk]:
    desk = Desk(engine)  # type: ignore[arg-type]
    yield desk
    desk.close()


def ask(desk: Desk, text: str = "a", stream: bool = True, **more: np.ndarray) -> Client:
    client = Client()
    tensors = {"text_input": np.array([text.encode()], object), "stream": np.array([stream]), **more}
    desk.take(tensors, (), client)
    return client


def answer(text: str) -> Answer:
    return Answer(text, (1, 2), FinishReason.EOS, 3)


def test_pieces_and_the_rest_of_the_answer_come_in_order(desk: Desk, engine: EngineDouble) -> None:
    client = ask(desk, "hé")
    (taken,) = engine.taken
    assert taken.request == Request(tuple("hé".encode()))
    for piece in ("Gr", "", "ü"):
        taken.say(Piece(piece, (1,)))
    taken.say(answer("Grüße"))
    assert [client.next(), client.next(), client.next()] == ["Gr", "ü", ("ße", answer("Grüße"))]
    assert client.nothing_more()


def test_one_response_holds_the_whole_answer_without_a_stream(desk: Desk, engine: EngineDouble) -> None:
    client = ask(desk, stream=False)
    engine.taken[0].say(Piece("Gr", (1,)))
    engine.taken[0].say(answer("Grüße"))
    assert client.next() == ("Grüße", answer("Grüße"))
    assert client.nothing_more()


def test_each_client_gets_its_own_pieces(desk: Desk, engine: EngineDouble) -> None:
    clients = [ask(desk, text) for text in "abc"]
    for round_ in range(3):
        for name, taken in zip("abc", engine.taken, strict=True):
            taken.say(Piece(f"{name}{round_}", (1,)))
    for name, client in zip("abc", clients, strict=True):
        assert [client.next() for _ in range(3)] == [f"{name}0", f"{name}1", f"{name}2"]


def test_a_client_that_leaves_is_found_without_any_event(desk: Desk, engine: EngineDouble) -> None:
    stays, leaves = ask(desk), ask(desk, stream=False)
    leaves.left = True
    assert engine.taken[1].cancelled.get(timeout=WITHIN)
    assert leaves.next() == CANCELLED
    engine.taken[1].say(Piece("late", (1,)))
    engine.taken[1].say(EngineClosedError("taken back", where="engine"))
    engine.taken[0].say(Piece("on", (1,)))
    assert stays.next() == "on"
    assert leaves.nothing_more()
    assert engine.taken[0].cancelled.empty()


def test_a_wire_that_cannot_tell_takes_its_own_request_along(desk: Desk, engine: EngineDouble) -> None:
    lost, leaves = ask(desk), ask(desk)
    lost.lost = True
    assert engine.taken[0].cancelled.get(timeout=WITHIN)
    leaves.left = True
    assert leaves.next() == CANCELLED


def test_a_broken_wire_takes_its_own_request_along(desk: Desk, engine: EngineDouble) -> None:
    broken, whole = ask(desk), ask(desk)
    broken.broken = True
    engine.taken[0].say(Piece("x", (1,)))
    assert engine.taken[0].cancelled.get(timeout=WITHIN)
    engine.taken[1].say(Piece("y", (1,)))
    assert whole.next() == "y"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (QueueFullError("5 requests wait already", fix="try again later"), "UNAVAILABLE", "try again later"),
        (EngineClosedError("the engine was closed"), "UNAVAILABLE", "the engine was closed"),
        (InputError("too long", where="prompt 0", fix="shorten it"), "INVALID_ARG", "prompt 0: too long"),
        (InputError("no template", where="/a/b.jinja", fix="give text"), "INVALID_ARG", "no template"),
        (RuntimeError("/secret/place"), "INTERNAL", "the server could not answer"),
        (RkExportError("device lost", where="/secret"), "INTERNAL", "the server could not answer"),
    ],
)
def test_errors_are_told_without_paths_at_once_and_later(
    error: Exception, kind: str, message: str, desk: Desk, engine: EngineDouble
) -> None:
    later = ask(desk)
    engine.taken[0].say(error)
    engine.refusal = error
    for refusal in (ask(desk).next(), later.next()):
        assert refusal.kind == kind
        assert message in refusal.message
        assert "/" not in refusal.message


def test_a_request_that_makes_no_sense_never_reaches_the_engine(desk: Desk, engine: EngineDouble) -> None:
    client = ask(desk, max_tokens=np.array([-1], np.int32))
    assert client.next().message.startswith("max_tokens: -1 is out of range")
    assert not engine.taken


def test_closing_ends_what_runs(engine: EngineDouble) -> None:
    desk = Desk(engine)  # type: ignore[arg-type]
    client = ask(desk)
    desk.close()
    assert client.next() == Refusal("UNAVAILABLE", "engine: the engine was closed")
