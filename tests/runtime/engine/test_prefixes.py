"""Prompts that begin alike: what is copied, what is kept, and that no answer changes by it."""

from __future__ import annotations

import numpy as np
import pytest
from runtime_models import CONTEXT, TinyDecoder, held_up

from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine import Engine, EngineOptions, Request
from rk_export.runtime.engine.prefixes import Held, KeptPrefixes, Match, common
from rk_export.runtime.engine.rounding import GRAIN

SHORT = GenerationOptions(max_new_tokens=6)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = TinyDecoder().write(tmp_path_factory.mktemp("bundle"), eos=257)
    return Session.from_pretrained(folder, provider="cpu", threads=1)


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 250, length).tolist())


def tokens_of(
    session: Session, prompt: tuple[int, ...], options: GenerationOptions = SHORT
) -> tuple[int, ...]:
    return session.generate([prompt], options=options)[0].token_ids


def asked(engine: Engine, *prompts: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return tokens and copied positions of prompts that are asked one after another."""
    answers = [engine.generate([Request(prompt, SHORT)])[0] for prompt in prompts]
    return [answer.token_ids for answer in answers], [answer.cached_tokens for answer in answers]


def test_a_prompt_copies_what_a_finished_one_computed(session: Session) -> None:
    shared = text(40)
    prompts = [shared + text(9, seed) for seed in (1, 2, 3)]
    with Engine(session, EngineOptions(slots=2, chunk=8)) as engine:
        found, cached = asked(engine, *prompts, prompts[0], shared[:39], text(40, 9))
        assert engine.counters().cached_tokens == sum(cached)
    assert cached == [0, 40, 40, 40, 32, 0]
    expected = [*prompts, prompts[0], shared[:39], text(40, 9)]
    assert found == [tokens_of(session, prompt) for prompt in expected]


def test_a_conversation_computes_only_what_is_new(session: Session) -> None:
    with Engine(session, EngineOptions(slots=2)) as engine:
        said = text(30)
        before: tuple[int, ...] = ()
        for turn in range(3):
            (answer,) = engine.generate([Request(said, SHORT)])
            assert answer.token_ids == tokens_of(session, said)
            # Tokens of an answer came one at a time, so they are computed again as a part of the prompt.
            assert answer.cached_tokens == len(before) // GRAIN * GRAIN
            before = said
            said = said + answer.token_ids + text(10, turn + 1)


def test_a_prompt_copies_from_one_that_is_running(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several answers to one prompt compute it once."""
    assert session.row_multiple  # found before steps are slow
    held_up(monkeypatch)
    prompt = text(50)
    sampled = GenerationOptions(max_new_tokens=6, temperature=1.0, seed=1)
    with Engine(session, EngineOptions(slots=4, kept_prefixes=0)) as engine:
        answers = engine.generate([Request(prompt, sampled, sample=index) for index in range(4)])
    assert [answer.cached_tokens for answer in answers] == [0, 48, 48, 48]
    rows = [session.generate([prompt] * 4, options=sampled)[index].token_ids for index in range(4)]
    assert [answer.token_ids for answer in answers] == rows
    assert len(set(rows)) == 4


def test_none_is_kept_where_none_is_wanted(session: Session) -> None:
    with Engine(session, EngineOptions(slots=1, kept_prefixes=0)) as engine:
        assert asked(engine, text(40), text(40))[1] == [0, 0]


def test_the_least_recently_used_goes(session: Session) -> None:
    a, b, c = text(40, 1), text(40, 2), text(40, 3)
    with Engine(session, EngineOptions(slots=1, kept_prefixes=2)) as engine:
        assert asked(engine, a, b, a, c, a, b)[1] == [0, 0, 32, 0, 32, 0]


def test_a_cancelled_prompt_may_be_kept_but_never_changes_an_answer(session: Session) -> None:
    prompt = text(80)
    with Engine(session, EngineOptions(slots=1, chunk=8)) as engine:
        ticket = engine.submit(Request(prompt, SHORT), lambda event: None)
        ticket.cancel()
        assert asked(engine, prompt)[0] == [tokens_of(session, prompt)]


def test_random_traffic_changes_no_answer(session: Session) -> None:
    """Beginnings of all lengths, in random order, among random neighbours."""
    rng = np.random.default_rng(5)
    stems = [text(60, seed) for seed in range(3)]
    prompts = [
        stems[int(rng.integers(3))][: int(rng.integers(1, 60))] + text(int(rng.integers(1, 20)), 100 + index)
        for index in range(60)
    ]
    with Engine(session, EngineOptions(slots=3, chunk=16, kept_prefixes=3)) as engine:
        answers = engine.generate([Request(prompt, SHORT) for prompt in prompts])
        assert engine.counters().cached_tokens > 200
    assert [answer.token_ids for answer in answers] == [tokens_of(session, prompt) for prompt in prompts]
    assert max(map(len, prompts)) + SHORT.max_new_tokens <= CONTEXT


def array(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int64)


def test_common_counts_from_the_beginning() -> None:
    assert common(array(1, 2, 3), array(1, 2, 4, 5)) == 2
    assert common(array(1, 2), array(1, 2, 3)) == 2
    assert common(array(9), array(1)) == 0
    assert common(array(), array(1)) == 0


def test_kept_slots_give_way_to_what_holds_them() -> None:
    kept, long = KeptPrefixes([7, 8]), np.arange(64)
    first = kept.place(Held(long[:32]))
    assert kept.place(Held(long[:16])) is None, "it is held already"
    assert kept.place(Held(long[:8])) is None, "it is too short"
    second = kept.place(Held(long))
    assert (first, second) == (8, 8), "the longer one takes the place of its beginning"
    assert kept.best(np.append(long[:40], [99, 98, 97]), {}) == Match(8, 40)
    assert kept.best(long[:18], {}) == Match(8, 16)
    assert kept.best(long[:17], {}) is None, "two tokens are left to compute"
    assert kept.best(long[:40], {3: Held(long[:16])}) == Match(8, 32)
