"""The engine: every answer is the one that its request gets alone, whoever joins, leaves, cancels or fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_models import CONTEXT, VOCAB, TinyDecoder, held_up

from rk_export.errors import InputError, RkExportError
from rk_export.runtime import FinishReason, GenerationOptions, Session
from rk_export.runtime.engine import (
    Answer,
    CancelledRequestError,
    Engine,
    EngineClosedError,
    EngineFaultError,
    EngineOptions,
    Piece,
    QueueFullError,
    Request,
)
from rk_export.runtime.engine.slots import SlotRunner
from rk_export.runtime.engine.tickets import Event

LONG = GenerationOptions(max_new_tokens=CONTEXT)
SAMPLED = GenerationOptions(max_new_tokens=12, temperature=1.3, top_p=0.9, seed=3, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = TinyDecoder().write(tmp_path_factory.mktemp("bundle"), eos=VOCAB - 1)
    return Session.from_pretrained(folder, provider="cpu", threads=1)


@pytest.fixture
def engine(session: Session) -> Iterator[Engine]:
    with Engine(session, EngineOptions(slots=3, chunk=8)) as engine:
        yield engine


def prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, 250, length).tolist()) for length in lengths]


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.last: Answer | RkExportError | None = None
        self.began, self.ended = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        assert self.last is None, "nothing comes after the last event"
        if isinstance(event, Piece):
            self.pieces.append(event)
            self.began.set()
        else:
            self.last = event
            self.ended.set()

    def wait(self) -> Answer | RkExportError:
        assert self.ended.wait(60)
        assert self.last is not None
        return self.last


def alone(session: Session, request: Request) -> tuple[tuple[int, ...], str, FinishReason]:
    """Return what a decoder of its own, without slots and chunks, makes of a request."""
    row = session.row(request.prompt, request.options, index=request.sample)
    decoder = session.decoder(batch=1, capacity=len(request.prompt) + row.limit)
    logits = decoder.prefill(np.array([request.prompt], np.int64))
    while row.advance(logits[0]) is not None and row.finish_reason is None:
        logits = decoder.step(np.array(row.tokens[-1:]))
    found = row.result()
    return found.token_ids, found.text, found.finish_reason


@pytest.mark.parametrize("slots", [1, 2, 3, 16])
@pytest.mark.parametrize(
    "options", [GenerationOptions(max_new_tokens=20), SAMPLED], ids=["greedy", "sampled"]
)
def test_every_answer_is_that_of_the_single_request(
    session: Session, slots: int, options: GenerationOptions
) -> None:
    requests = [
        Request(prompt, replace(options, max_new_tokens=1 + index % 7 * 3), sample=index)
        for index, prompt in enumerate(prompts(1, 40, 9, 17, 2, 33, 8, 65, 24, 3, 90))
    ]
    with Engine(session, EngineOptions(slots=slots, chunk=8)) as engine:
        answers = engine.generate(requests)
    found = [(answer.token_ids, answer.text, answer.finish_reason) for answer in answers]
    assert found == [alone(session, request) for request in requests]
    assert len({answer.token_ids for answer in answers}) > 5, "the answers differ from each other"


def test_requests_that_come_later_join_what_is_running(
    session: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_up(monkeypatch, 0.005)
    first = Heard()
    engine.submit(Request(prompts(5)[0], LONG), first)
    assert first.began.wait(60)
    second = engine.generate([Request(prompts(30, seed=1)[0], SAMPLED)])[0]
    assert first.last is None, "the second was answered while the first was running"
    assert second.token_ids == alone(session, Request(prompts(30, seed=1)[0], SAMPLED))[0]
    answer = first.wait()
    assert isinstance(answer, Answer)
    assert answer.token_ids == alone(session, Request(prompts(5)[0], LONG))[0]


def test_pieces_join_to_the_answer(engine: Engine) -> None:
    heard = Heard()
    engine.submit(Request(prompts(6)[0], replace(SAMPLED, max_new_tokens=40, logprobs=2)), heard)
    answer = heard.wait()
    assert isinstance(answer, Answer)
    assert "".join(piece.text for piece in heard.pieces) == answer.text
    assert tuple(token for piece in heard.pieces for token in piece.token_ids) == answer.token_ids
    assert tuple(score for piece in heard.pieces for score in piece.scores) == answer.scores
    assert [score.token for score in answer.scores] == list(answer.token_ids)


def test_log_probabilities_are_those_of_the_model(session: Session, engine: Engine) -> None:
    """Against a softmax of the logits in float64, temperature and penalty left out."""
    prompt = prompts(6)[0]
    answer = engine.generate([Request(prompt, replace(SAMPLED, logprobs=3))])[0]
    text = np.array([[*prompt, *answer.token_ids]])
    logits = session.prefill_logits(text)[0, len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for row, score in zip(expected, answer.scores, strict=True):
        assert score.logprob == pytest.approx(row[score.token], abs=1e-4)
        assert [token for token, _ in score.top] == np.argsort(-row)[:3].tolist()
        assert [value for _, value in score.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)


class Even:
    """Allows even tokens only, and keeps what it was told."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self, logits: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(logits)) % 2 == 0, logits, -np.inf)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def test_a_constraint_decides_what_may_come(engine: Engine) -> None:
    constraint = Even()
    answer = engine.generate([Request(prompts(6)[0], GenerationOptions(max_new_tokens=10), constraint)])[0]
    assert all(token % 2 == 0 for token in answer.token_ids)
    assert tuple(constraint.accepted) == answer.token_ids


class Nothing(Even):
    """Allows no token, as a broken grammar would."""

    def mask(self, logits: np.ndarray) -> np.ndarray:
        return np.full_like(logits, -np.inf)


def test_a_request_that_fails_leaves_the_others_alone(session: Session, engine: Engine) -> None:
    good, bad = Heard(), Heard()
    engine.submit(Request(prompts(7)[0], LONG), good)
    engine.submit(Request(prompts(9)[0], LONG, Nothing()), bad)
    failure = bad.wait()
    assert isinstance(failure, InputError)
    assert "no token can be chosen" in str(failure)
    answer = good.wait()
    assert isinstance(answer, Answer)
    assert answer.token_ids == alone(session, Request(prompts(7)[0], LONG))[0]
    assert engine.counters().finished["failed"] == 1


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ((), "it has no tokens"),
        ((VOCAB,), f"token {VOCAB} is outside the model's vocabulary"),
        ((-1,), "is negative"),
        ((1,) * CONTEXT, f"{CONTEXT} tokens leave no room in a context of {CONTEXT}"),
    ],
)
def test_a_bad_prompt_is_refused_at_once(engine: Engine, prompt: tuple[int, ...], what: str) -> None:
    with pytest.raises(InputError) as refused:
        engine.submit(Request(prompt), Heard())
    assert what in str(refused.value)
    assert engine.counters().requests == 0


def test_a_cancelled_request_frees_its_slot(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.row_multiple  # found before steps are slow
    held_up(monkeypatch)
    with Engine(session, EngineOptions(slots=1, chunk=8, queue=4)) as engine:
        running, waiting, last = Heard(), Heard(), Heard()
        first = engine.submit(Request(prompts(5)[0], LONG), running)
        second = engine.submit(Request(prompts(6)[0], LONG), waiting)
        engine.submit(Request(prompts(7)[0], SAMPLED), last)
        assert running.began.wait(60)
        second.cancel()
        first.cancel()
        assert isinstance(waiting.wait(), CancelledRequestError)
        assert isinstance(running.wait(), CancelledRequestError)
        answer = last.wait()
        assert isinstance(answer, Answer)
        assert answer.token_ids == alone(session, Request(prompts(7)[0], SAMPLED))[0]
        first.cancel()  # once more, and of one that is gone
        assert engine.counters().finished["cancelled"] == 2
    assert not waiting.pieces


def test_a_full_queue_refuses(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.row_multiple  # found before steps are slow
    held_up(monkeypatch)
    with Engine(session, EngineOptions(slots=1, queue=1)) as engine:
        heard = [Heard() for _ in range(2)]
        for one in heard:
            engine.submit(Request(prompts(5)[0], GenerationOptions(max_new_tokens=20)), one)
        with pytest.raises(QueueFullError):
            engine.submit(Request(prompts(5)[0]), Heard())
        assert engine.counters().refused == 1
        assert all(isinstance(one.wait(), Answer) for one in heard)
        engine.generate([Request(prompts(5)[0], SAMPLED)])  # there is room again


@pytest.mark.parametrize("finish", [True, False])
def test_closing_finishes_or_ends_what_was_taken(
    session: Session, monkeypatch: pytest.MonkeyPatch, finish: bool
) -> None:
    assert session.row_multiple
    held_up(monkeypatch)
    engine = Engine(session, EngineOptions(slots=1))
    heard = [Heard() for _ in range(3)]
    for one in heard:
        engine.submit(Request(prompts(5)[0], GenerationOptions(max_new_tokens=12)), one)
    assert heard[0].began.wait(60)
    engine.close(finish=finish)
    kind = Answer if finish else EngineClosedError
    assert all(isinstance(one.wait(), kind) for one in heard)
    with pytest.raises(EngineClosedError):
        engine.submit(Request(prompts(5)[0]), Heard())
    engine.close()  # twice is fine


def test_closing_waits_no_longer_than_it_is_told(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.row_multiple
    held_up(monkeypatch, 0.05)
    engine, heard = Engine(session, EngineOptions(slots=1)), Heard()
    engine.submit(Request(prompts(5)[0], LONG), heard)
    begin = time.monotonic()
    engine.close(timeout=0.2)
    assert time.monotonic() - begin < 3
    assert isinstance(heard.wait(), EngineClosedError)


def broken(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Make the next runs of prompts fail."""
    extend, left = SlotRunner.extend, [times]

    def run(self: SlotRunner, *given: Any, **named: Any) -> np.ndarray:
        if left[0]:
            left[0] -= 1
            raise MemoryError("no memory is left")
        return extend(self, *given, **named)

    monkeypatch.setattr(SlotRunner, "extend", run)


def test_a_fault_ends_what_was_running_and_nothing_else(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session.row_multiple
    with Engine(session, EngineOptions(slots=1)) as engine:
        broken(monkeypatch, 1)
        heard = [Heard(), Heard()]
        for one in heard:
            engine.submit(Request(prompts(5)[0], SAMPLED), one)
        failure, answer = (one.wait() for one in heard)
        assert isinstance(failure, EngineFaultError)
        assert "MemoryError" in str(failure)
        assert isinstance(answer, Answer)
        assert answer.token_ids == alone(session, Request(prompts(5)[0], SAMPLED))[0]
        assert engine.alive
        assert engine.counters().finished["failed"] == 1


def test_an_engine_that_fails_again_and_again_ends(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.row_multiple
    engine = Engine(session, EngineOptions(slots=1))
    broken(monkeypatch, 100)
    heard = [Heard() for _ in range(5)]
    for one in heard:
        try:
            engine.submit(Request(prompts(5)[0]), one)
        except EngineClosedError as error:
            one(error)
    kinds = [type(one.wait()) for one in heard]
    assert kinds[:3] == [EngineFaultError] * 3
    assert set(kinds[3:]) == {EngineClosedError}
    engine.close()
    assert not engine.alive


def test_a_listener_that_fails_hurts_nobody_else(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    def bad(event: Event) -> None:
        raise ValueError("a fault of the listener")

    with Engine(session, EngineOptions(slots=2)) as engine:
        engine.submit(Request(prompts(9)[0], SAMPLED), bad)
        (answer,) = engine.generate([Request(prompts(5)[0], SAMPLED)])
        assert answer.token_ids == alone(session, Request(prompts(5)[0], SAMPLED))[0]
    assert "a fault of the listener" in caplog.text


def test_generate_ends_with_the_first_failure(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.row_multiple
    held_up(monkeypatch)
    with Engine(session, EngineOptions(slots=2)) as engine:
        with pytest.raises(InputError, match="no token can be chosen"):
            engine.generate([Request(prompts(5)[0], LONG), Request(prompts(6)[0], LONG, Nothing())])
        engine.generate([Request(prompts(7)[0], GenerationOptions(max_new_tokens=1))])
        assert engine.counters().finished["cancelled"] == 1


def test_the_queue_counts_what_finds_no_slot(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """With guesses requests run one at a time, whatever the options say of slots."""
    held_up_prompts(monkeypatch)
    with Engine(session, EngineOptions(slots=8, queue=2, lookup=True)) as engine:
        assert engine.slots == 1
        heard = [Heard() for _ in range(3)]
        for one in heard:
            engine.submit(Request(prompts(5)[0], GenerationOptions(max_new_tokens=8)), one)
        with pytest.raises(QueueFullError):
            engine.submit(Request(prompts(5)[0]), Heard())
        assert all(isinstance(one.wait(), Answer) for one in heard)


def held_up_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = SlotRunner.extend

    def slow(self: SlotRunner, *given: Any, **named: Any) -> np.ndarray:
        time.sleep(0.02)
        return extend(self, *given, **named)

    monkeypatch.setattr(SlotRunner, "extend", slow)


class HeldWork:
    """Work that keeps the engine's thread busy until it is released."""

    def __init__(self) -> None:
        self.release, self._entered = threading.Event(), threading.Event()

    async def begin(self, engine: Engine) -> asyncio.Task[None]:
        """Return once the thread is busy."""
        task = asyncio.create_task(engine.run(self._work))
        while not self._entered.is_set():
            await asyncio.sleep(0.001)
        return task

    def _work(self) -> None:
        self._entered.set()
        assert self.release.wait(60)


def test_work_that_nobody_waits_for_is_not_done(session: Session) -> None:
    done: list[int] = []
    held = HeldWork()

    async def go(engine: Engine) -> None:
        first = await held.begin(engine)
        others = [asyncio.create_task(engine.run(lambda: done.append(1))) for _ in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError):
            await engine.run(lambda: done.append(2))
        for task in others[:2]:
            task.cancel()
        await asyncio.sleep(0.01)
        held.release.set()
        await first
        await others[2]

    with Engine(session, EngineOptions(queue=2)) as engine:
        asyncio.run(asyncio.wait_for(go(engine), 60))
    assert done == [1]


def test_closing_at_once_does_no_more_work(session: Session) -> None:
    held = HeldWork()

    async def go(engine: Engine) -> None:
        first = await held.begin(engine)
        second = asyncio.create_task(engine.run(lambda: pytest.fail("it was done")))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(asyncio.to_thread(engine.close, finish=False))
        await asyncio.sleep(0.01)
        held.release.set()
        await closing
        await first
        with pytest.raises(EngineClosedError):
            await second

    asyncio.run(asyncio.wait_for(go(Engine(session)), 60))


def test_asyncio_streams_answers_and_takes_requests_back(
    session: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        request = Request(prompts(5)[0], GenerationOptions(max_new_tokens=9))
        items = [item async for item in engine.stream(request)]
        assert isinstance(items[-1], Answer)
        assert all(isinstance(item, Piece) for item in items[:-1])
        assert items[-1].token_ids == alone(session, request)[0]
        together = await asyncio.gather(
            *(engine.answer(Request(prompt, SAMPLED)) for prompt in prompts(4, 50, 9))
        )
        assert [answer.token_ids for answer in together] == [
            alone(session, Request(prompt, SAMPLED))[0] for prompt in prompts(4, 50, 9)
        ]
        held_up(monkeypatch)
        task = asyncio.create_task(engine.answer(Request(prompts(5)[0], LONG)))
        while not engine.counters().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = engine.stream(Request(prompts(5)[0], LONG))
        assert isinstance(await anext(stream), Piece)
        await stream.aclose()
        while engine.counters().running:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(go(), 60))
    assert engine.counters().finished.get("cancelled", 0) >= 1


def test_work_runs_on_the_thread_of_the_engine(engine: Engine) -> None:
    async def go() -> tuple[str, str]:
        name = await engine.run(lambda: threading.current_thread().name)
        with pytest.raises(ZeroDivisionError):
            await engine.run(lambda: 1 // 0)
        return name, await engine.run(lambda: threading.current_thread().name)

    assert asyncio.run(go()) == ("rk-export engine", "rk-export engine")


def test_counters_add_up(engine: Engine) -> None:
    requests = [Request(prompt, GenerationOptions(max_new_tokens=5)) for prompt in prompts(20, 3, 40)]
    answers = engine.generate(requests)
    counters = engine.counters()
    assert (counters.requests, counters.running, counters.waiting) == (3, 0, 0)
    assert counters.prompt_tokens == 63
    assert counters.new_tokens == sum(len(answer.token_ids) for answer in answers)
    assert sum(counters.finished.values()) == 3


@pytest.mark.parametrize(
    ("form", "together"),
    [
        (TinyDecoder(lengths="sum"), True),
        (TinyDecoder(lengths="total"), False),
        (TinyDecoder(grouped=False), False),
    ],
    ids=["sums of the mask", "one length", "growing cache"],
)
def test_a_graph_that_cannot_run_rows_together_runs_them_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: TinyDecoder, together: bool
) -> None:
    session = Session.from_pretrained(form.write(tmp_path), provider="cpu", threads=1)
    requests = [Request(prompt, GenerationOptions(max_new_tokens=8)) for prompt in prompts(5, 20, 9)]
    with Engine(session, EngineOptions(slots=3)) as engine:
        answers = engine.generate(requests)
        heard = Heard()
        engine.submit(Request(prompts(5)[0], LONG), heard).cancel()
        assert isinstance(heard.wait(), CancelledRequestError | Answer)
    assert ("one after another" in caplog.text) is not together
    assert [answer.token_ids for answer in answers] == [alone(session, request)[0] for request in requests]


def test_a_capacity_beyond_the_context_is_refused(session: Session) -> None:
    with pytest.raises(InputError, match=f"do not fit into a context of {CONTEXT}"):
        Engine(session, EngineOptions(capacity=CONTEXT + 1))


@pytest.mark.parametrize(
    "change",
    [{"slots": 0}, {"queue": -1}, {"chunk": 0}, {"capacity": 1}, {"kept_prefixes": -1}],
    ids=lambda change: next(iter(change)),
)
def test_options_out_of_range_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError, match="out of range"):
        EngineOptions(**change)


def test_many_threads_may_submit(session: Session, engine: Engine) -> None:
    wanted = [Request(prompt, SAMPLED, sample=index) for index, prompt in enumerate(prompts(*range(1, 25)))]
    heard = [Heard() for _ in wanted]

    def submit(index: int) -> None:
        engine.submit(wanted[index], heard[index])

    threads = [threading.Thread(target=submit, args=(index,)) for index in range(len(wanted))]
    for thread in threads:
        thread.start()
    answers = [one.wait() for one in heard]
    assert [answer.token_ids for answer in answers if isinstance(answer, Answer)] == [
        alone(session, request)[0] for request in wanted
    ]
