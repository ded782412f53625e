"""Models with short convolutions: states of a fixed size, which slots keep, hand on and never lead back from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_models import CONTEXT, HIDDEN, LAYERS, TAPS, VOCAB, TinyDecoder, held_up

from rk_export.errors import InputError
from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine import CancelledRequestError, Engine, EngineOptions, Request
from rk_export.runtime.engine.device_copy import Copier
from rk_export.runtime.engine.open_batch import open_batch
from rk_export.runtime.engine.prefixes import Held, KeptPrefixes, Match
from rk_export.runtime.engine.resume_points import FAR, ResumePoints
from rk_export.runtime.engine.rounding import GRAIN
from rk_export.runtime.engine.slots import SlotBuffers
from rk_export.runtime.engine.state_slots import StateSlots

STATES = 2
SHORT = GenerationOptions(max_new_tokens=6)
SAMPLED = GenerationOptions(max_new_tokens=12, temperature=1.3, top_p=0.9, seed=3, repetition_penalty=1.2)


def opened(folder: Path, **form: Any) -> Session:
    bundle = TinyDecoder(states=STATES, **form).write(folder, eos=VOCAB - 1)
    return Session.from_pretrained(bundle, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return opened(tmp_path_factory.mktemp("bundle"))


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 250, length).tolist())


def alone(session: Session, request: Request) -> tuple[int, ...]:
    """Return what a decoder of its own, without slots and chunks, makes of a request."""
    row = session.row(request.prompt, request.options, index=request.sample)
    decoder = session.decoder(batch=1, capacity=len(request.prompt) + row.limit)
    logits = decoder.prefill(np.array([request.prompt], np.int64))
    while row.advance(logits[0]) is not None and row.finish_reason is None:
        logits = decoder.step(np.array(row.tokens[-1:]))
    return row.result().token_ids


def test_the_layout_lists_states_behind_keys_and_values(session: Session) -> None:
    layout = session.layout
    assert [state.past for state in layout.states] == [f"past_conv.{LAYERS}", f"past_conv.{LAYERS + 1}"]
    assert all(state.shape == (HIDDEN, TAPS) for state in layout.states)
    assert layout.presents[-2:] == (f"present_conv.{LAYERS}", f"present_conv.{LAYERS + 1}")
    assert [array.shape for array in layout.empty_past(2)][-1] == (2, HIDDEN, TAPS)


@pytest.mark.parametrize("grouped", [True, False], ids=["shared", "growing"])
def test_steps_continue_what_was_computed_at_once(tmp_path: Path, grouped: bool) -> None:
    """A decoder and plain calls, and a state that is left out would show."""
    session, tokens = opened(tmp_path, grouped=grouped), np.array([text(20)])
    whole, _ = session.forward(tokens)
    first, past = session.forward(tokens[:, :9])
    rest, _ = session.forward(tokens[:, 9:10], past=past)
    forgotten = (*past[:-1], np.zeros_like(past[-1]))
    other, _ = session.forward(tokens[:, 9:10], past=forgotten)
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), whole[:, :10], atol=1e-4)
    assert np.abs(other - rest).max() > 0.01
    decoder = session.decoder(batch=1, capacity=24)
    stepped = [np.array(decoder.prefill(tokens[:, :9]))]
    stepped += [np.array(decoder.step(tokens[:, position])) for position in range(9, 20)]
    np.testing.assert_allclose(np.stack(stepped, axis=1)[0], whole[0, 8:], atol=1e-4)


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("options", [replace(SHORT, max_new_tokens=20), SAMPLED], ids=["greedy", "sampled"])
def test_every_answer_is_that_of_the_single_request(
    session: Session, slots: int, options: GenerationOptions
) -> None:
    lengths = (1, 40, 9, 17, 2, 33, 8, 65, 24, 3, 90)
    requests = [
        Request(text(length, index), replace(options, max_new_tokens=1 + index % 7 * 3), sample=index)
        for index, length in enumerate(lengths)
    ]
    with Engine(session, EngineOptions(slots=slots, chunk=8)) as engine:
        answers = engine.generate(requests)
    found = [answer.token_ids for answer in answers]
    assert found == [alone(session, request) for request in requests]
    assert len(set(found)) > 5, "the answers differ from each other"


def test_logits_in_company_are_equal_to_the_bit(session: Session) -> None:
    """Log-probabilities of the same requests alone and among others, in other chunks."""
    asked = [
        Request(text(length, seed), replace(SHORT, logprobs=3)) for seed, length in enumerate((5, 40, 23, 9))
    ]
    assert session.rows_are_independent

    def scores(slots: int, chunk: int) -> list[Any]:
        with Engine(session, EngineOptions(slots=slots, chunk=chunk, kept_prefixes=0)) as engine:
            return [answer.scores for answer in engine.generate(asked)]

    assert scores(1, 64) == scores(4, 8)


def test_rows_join_leave_and_are_cancelled(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that stay get what they get alone, whoever is taken back in a prompt or in an answer."""
    assert session.row_multiple  # found before steps are slow
    held_up(monkeypatch, 0.002)
    rng = np.random.default_rng(1)
    requests = [
        Request(
            text(int(rng.integers(1, 60)), seed), GenerationOptions(max_new_tokens=int(rng.integers(1, 16)))
        )
        for seed in range(24)
    ]
    found: dict[int, Any] = {}
    with Engine(session, EngineOptions(slots=3, chunk=8)) as engine:

        def listen(index: int) -> Any:
            def heard(event: Any) -> None:
                found[index] = event
                if index % 4 == 3 and index in tickets:
                    tickets[index].cancel()

            return heard

        tickets: dict[int, Any] = {}
        for index, request in enumerate(requests):
            tickets[index] = engine.submit(request, listen(index))
            if index % 6 == 5:
                tickets[index].cancel()
    cancelled = {index for index, event in found.items() if isinstance(event, CancelledRequestError)}
    assert cancelled
    for index in set(range(len(requests))) - cancelled:
        assert found[index].token_ids == alone(session, requests[index])


def asked(engine: Engine, *prompts: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[int]]:
    answers = [engine.generate([Request(prompt, SHORT)])[0] for prompt in prompts]
    return [answer.token_ids for answer in answers], [answer.cached_tokens for answer in answers]


def test_a_conversation_goes_on_from_its_last_prompt(session: Session) -> None:
    with Engine(session, EngineOptions(slots=2)) as engine:
        said = text(30)
        before: tuple[int, ...] = ()
        for turn in range(3):
            (answer,) = engine.generate([Request(said, SHORT)])
            assert answer.token_ids == alone(session, Request(said, SHORT))
            # The state is known before the last tokens of the last prompt.
            assert answer.cached_tokens == max(0, len(before) - 2) // GRAIN * GRAIN
            before = said
            said = said + answer.token_ids + text(10, turn + 1)


def test_the_third_prompt_with_a_beginning_copies_it(session: Session) -> None:
    """The second one leaves the state where it parts from the first one."""
    shared = text(40)
    prompts = [shared + text(20, seed) for seed in (1, 2, 3, 4)]
    with Engine(session, EngineOptions(slots=2)) as engine:
        found, cached = asked(engine, *prompts, prompts[0])
    assert cached == [0, 0, 40, 40, 56]
    assert found == [alone(session, Request(prompt, SHORT)) for prompt in (*prompts, prompts[0])]


def test_random_traffic_changes_no_answer(session: Session) -> None:
    rng = np.random.default_rng(5)
    stems = [text(60, seed) for seed in range(3)]
    prompts = [
        stems[int(rng.integers(3))][: int(rng.integers(1, 60))] + text(int(rng.integers(1, 20)), 100 + index)
        for index in range(60)
    ]
    with Engine(session, EngineOptions(slots=3, chunk=16, kept_prefixes=3)) as engine:
        answers = engine.generate([Request(prompt, SHORT) for prompt in prompts])
        assert engine.counters().cached_tokens > 200
    expected = [alone(session, Request(prompt, SHORT)) for prompt in prompts]
    assert [answer.token_ids for answer in answers] == expected
    assert max(map(len, prompts)) + SHORT.max_new_tokens <= CONTEXT


def test_nothing_is_guessed_for_a_model_with_states(session: Session, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a state from which nothing leads back"):
        open_batch(session, EngineOptions(lookup=True))
    plain = TinyDecoder().write(tmp_path, eos=VOCAB - 1)
    stateless = Session.from_pretrained(plain, provider="cpu", threads=1)
    with pytest.raises(InputError, match="a state from which nothing leads back"):
        open_batch(stateless, EngineOptions(), draft=session)


def filled(session: Session, *, on_device: bool) -> StateSlots:
    copier = Copier(session.layout.cache_dtype, "cpu") if on_device else None
    states = StateSlots(session.layout, slots=4, device="cpu", copier=copier)
    rng = np.random.default_rng(0)
    for slot in range(4):
        states.write(slot, tuple(rng.random((HIDDEN, TAPS), np.float32) for _ in range(STATES)))
    return states


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_slots_that_are_not_touched_keep_their_states(session: Session, on_device: bool) -> None:
    """Those of a device are copied by a graph, here carried out on the CPU."""
    states = filled(session, on_device=on_device)
    before = [states.read(slot) for slot in range(4)]
    states.copy(3, 0)
    states.clear(2)
    after = [states.read(slot) for slot in range(4)]
    for state, (found, old) in enumerate(
        zip(zip(*after, strict=True), zip(*before, strict=True), strict=True)
    ):
        np.testing.assert_array_equal(found[0], old[3], err_msg=str(state))
        np.testing.assert_array_equal(found[1], old[1])
        np.testing.assert_array_equal(found[2], np.zeros_like(old[2]))
        np.testing.assert_array_equal(found[3], old[3])


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_run_replaces_the_states_of_its_slots_alone(session: Session, on_device: bool) -> None:
    states, buffers = (
        filled(session, on_device=on_device),
        SlotBuffers(session.layout, slots=4, capacity=8, device="cpu"),
    )
    buffers.states = states
    before = [states.read(slot) for slot in range(4)]
    session.slot_runner(buffers).step(1, np.array([7, 9]), np.array([2, 3]))
    after = [states.read(slot) for slot in range(4)]
    for slot, (old, new) in enumerate(zip(before, after, strict=True)):
        for one, other in zip(old, new, strict=True):
            if slot in (1, 2):
                np.testing.assert_array_equal(other[:, :-1], one[:, 1:])
                assert not np.array_equal(other[:, -1], one[:, -1])
            else:
                np.testing.assert_array_equal(other, one)


def test_states_are_kept_where_prompts_part(session: Session) -> None:
    states = filled(session, on_device=False)
    points = ResumePoints(states, tokens=2 * FAR + 50, shared=40)
    assert points.end(0, 512) == 40
    assert points.end(40, 512) == 512
    assert points.end(FAR, 2 * FAR + 50) == 2 * FAR + 48
    for position in (40, 104, 40 + FAR, 2 * FAR + 48, 2 * FAR + 50):
        points.reached(1, position)
    assert list(points.marks) == [40, 40 + FAR, 2 * FAR + 48]
    assert not ResumePoints(states, tokens=12, shared=8).marks


def test_a_kept_prompt_is_used_up_to_a_known_state_only() -> None:
    kept, long = KeptPrefixes([7, 8]), np.arange(64)
    state = (np.zeros(1),)
    assert kept.place(Held(long[:48], {24: state, 40: state})) == 8
    assert kept.best(long[:45], {}) == Match(8, 40, state)
    short = kept.best(long[:34], {})
    assert short is not None
    assert short.positions == 24
    assert kept.best(long[:20], {}) is None
    assert kept.longest(long[:34], {}) == 32
    assert kept.place(Held(long[:32], {32: state})) is None, "it is held already"
    learnt = kept.best(long[:36], {})
    assert learnt is not None
    assert learnt.positions == 32, "the state that the shorter one knew"
