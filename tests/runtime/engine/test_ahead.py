"""Guesses: whatever is guessed, the answer is the one without guesses, and sampled answers keep their distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from runtime_models import CONTEXT, TinyDecoder, byte_tokenizer

from rk_export.errors import InputError
from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine import Answer, Engine, EngineOptions, Request
from rk_export.runtime.engine.ahead import GuessLength, PromptLookup, Worth
from rk_export.runtime.engine.rounding import LONGEST_CHECK

LOOKUP = EngineOptions(lookup=True)
PROMPT = tuple(b"one two three one two three one two")
OPTIONS = [
    GenerationOptions(max_new_tokens=40),
    GenerationOptions(max_new_tokens=40, temperature=0.7, seed=5, repetition_penalty=1.1),
    GenerationOptions(max_new_tokens=40, temperature=2.0, seed=6, top_p=0.9, top_k=20, min_p=0.01),
]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = TinyDecoder().write(tmp_path_factory.mktemp("bundle"))
    return Session.from_pretrained(folder, provider="cpu", threads=1)


class Guesses:
    """A drafter that knows the answer, and gets some of it wrong."""

    def __init__(self, text: Sequence[int], wrong: float, length: int = 5) -> None:
        self.text, self.wrong, self.length = list(text), wrong, length
        self.rng = np.random.default_rng(0)
        self.learned: list[tuple[int, int]] = []

    def propose(self, tokens: Sequence[int], room: int) -> list[int]:
        ahead = self.text[len(tokens) :][: max(0, min(self.length, room))]
        return [int(self.rng.integers(250)) if self.rng.random() < self.wrong else token for token in ahead]

    def learn(self, drafted: int, accepted: int) -> None:
        self.learned.append((drafted, accepted))


def answer(session: Session, options: GenerationOptions, drafter: object) -> Answer:
    with Engine(session, LOOKUP) as engine:
        engine._batch._drafter = drafter  # type: ignore[attr-defined]
        return engine.generate([Request(PROMPT, options)])[0]


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "sampled", "hot"])
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_right_and_wrong_guesses_leave_the_answer_as_it_is(
    session: Session, options: GenerationOptions, wrong: float
) -> None:
    plain = answer(session, options, Guesses((), 0))
    text = PROMPT + plain.token_ids
    guessed = answer(session, options, drafter := Guesses(text, wrong))
    assert (guessed.token_ids, guessed.text) == (plain.token_ids, plain.text)
    assert guessed.drafted_tokens == sum(drafted for drafted, _ in drafter.learned) > 0
    assert guessed.accepted_tokens == sum(accepted for _, accepted in drafter.learned)
    if wrong == 0:
        assert guessed.accepted_tokens == guessed.drafted_tokens
    elif wrong == 1:
        assert guessed.accepted_tokens < guessed.drafted_tokens / 4
    assert plain.drafted_tokens == 0


def test_an_end_within_the_guesses_ends_the_answer(tmp_path: Path) -> None:
    free = Session.from_pretrained(TinyDecoder().write(tmp_path / "free"), provider="cpu", threads=1)
    plain = answer(free, OPTIONS[0], Guesses((), 0))
    eos = plain.token_ids[7]
    session = Session.from_pretrained(
        TinyDecoder().write(tmp_path / "eos", eos=eos), provider="cpu", threads=1
    )
    ended = answer(session, OPTIONS[0], Guesses(PROMPT + plain.token_ids, 0.0, length=12))
    assert ended.token_ids == plain.token_ids[: plain.token_ids.index(eos) + 1]
    assert ended.finish_reason == "eos"


def test_guesses_keep_within_the_limits(session: Session) -> None:
    """An answer that fills the context to its last position."""
    options = GenerationOptions(max_new_tokens=CONTEXT)
    plain = answer(session, options, Guesses((), 0))
    guessed = answer(session, options, Guesses(PROMPT + plain.token_ids, 0.0, length=14))
    assert guessed.token_ids == plain.token_ids
    assert len(PROMPT) + len(guessed.token_ids) == CONTEXT


def test_sampled_answers_keep_their_distribution(session: Session) -> None:
    """First two tokens over many seeds, with guesses that are often wrong, against the model's own probabilities."""
    prompt, draws = PROMPT[:9], 1500
    options = [
        GenerationOptions(max_new_tokens=2, temperature=1.0, top_k=4, seed=seed) for seed in range(draws)
    ]
    with Engine(session, LOOKUP) as engine:
        first = session.prefill_logits(np.array([prompt]))[0, -1]
        likeliest = int(first.argmax())
        engine._batch._drafter = Guesses((*prompt, likeliest, likeliest), 0.3)  # type: ignore[attr-defined]
        answers = [engine.generate([Request(prompt, one)])[0].token_ids for one in options]
    for position in range(2):
        # The second token is looked at where the first was the likeliest one.
        drawn = [tokens[position] for tokens in answers if position == 0 or tokens[0] == likeliest]
        text = np.array([prompt if position == 0 else (*prompt, likeliest)])
        logits = session.prefill_logits(text)[0, -1].astype(np.float64)
        kept = np.argsort(-logits)[:4]
        weights = np.exp(logits[kept] - logits[kept].max())
        expected = weights / weights.sum()
        found = np.array([drawn.count(int(token)) for token in kept]) / len(drawn)
        assert found.sum() == pytest.approx(1)
        error = np.sqrt(expected * (1 - expected) / len(drawn))
        assert (np.abs(found - expected) < 4 * error + 1e-3).all()


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "sampled", "hot"])
def test_lookup_leaves_the_answer_as_it_is(session: Session, options: GenerationOptions) -> None:
    with Engine(session, LOOKUP) as engine:
        (found,) = engine.generate([Request(PROMPT, options)])
    assert found.token_ids == answer(session, options, Guesses((), 0)).token_ids


@pytest.mark.parametrize("seed", [0, 1], ids=["the model itself", "another model"])
@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "sampled", "hot"])
def test_a_draft_leaves_the_answer_as_it_is(
    session: Session, tmp_path: Path, options: GenerationOptions, seed: int
) -> None:
    draft = Session.from_pretrained(TinyDecoder(seed=seed).write(tmp_path), provider="cpu", threads=1)
    requests = [Request(PROMPT, options), Request(PROMPT[:20], options), Request(PROMPT, options)]
    with Engine(session, draft=draft) as engine:
        answers = engine.generate(requests)
        counters = engine.counters()
    for request, found in zip(requests, answers, strict=True):
        with Engine(session, LOOKUP) as engine:
            engine._batch._drafter = Guesses((), 0)  # type: ignore[attr-defined]
            assert found.token_ids == engine.generate([request])[0].token_ids
    assert counters.drafted_tokens == sum(found.drafted_tokens for found in answers) > 0
    if seed == 0 and options.greedy:
        assert counters.accepted_tokens > 0.9 * counters.drafted_tokens


def test_lookup_finds_the_latest_place() -> None:
    lookup = PromptLookup()
    assert lookup.propose([1, 2, 3, 9, 8, 1, 2, 3, 5, 6, 1, 2, 3], 3) == [5, 6, 1]
    assert lookup.propose([7, 2, 3, 9, 1, 2, 3], 1) == [9], "two tokens will do"
    assert lookup.propose([1, 2, 3, 4, 5], 4) == []
    assert lookup.propose([1], 4) == []
    assert lookup.propose([1, 2, 1, 2], 0) == []


def test_guesses_grow_with_success_and_shrink_without_it() -> None:
    length = GuessLength()
    begun = length.next(99)
    length.learn(begun, begun)
    assert length.next(99) == 2 * begun
    assert length.next(3) == 3
    for _ in range(5):
        length.learn(length.next(99), length.next(99))
    assert length.next(99) == LONGEST_CHECK - 1
    length.learn(LONGEST_CHECK - 1, 3)
    assert length.next(99) == 4
    length.learn(4, 0)
    assert length.next(99) == 2


@pytest.mark.parametrize("pays", [True, False])
def test_guesses_stay_off_where_they_lose_time(pays: bool) -> None:
    worth, tried = Worth(), []
    for _ in range(400):
        tried.append(worth.guess())
        worth.note(tried[-1], 1.0, 2 if tried[-1] is pays else 1)
    assert tried[:2] == [False, True], "both are timed first"
    share = tried.count(pays) / len(tried)
    assert 0.85 < share < 1, "the better one, and the other at times"


def test_guesses_come_back_when_they_pay_again() -> None:
    worth = Worth()
    for _ in range(100):
        guess = worth.guess()
        worth.note(guess, 1.0, 1 if guess else 2)
    later = []
    for _ in range(200):
        later.append(worth.guess())
        worth.note(later[-1], 1.0, 4 if later[-1] else 2)
    assert all(later[-20:])


def test_a_draft_with_fewer_rows_guesses_nothing_after_a_token_that_it_cannot_read(
    session: Session, tmp_path: Path
) -> None:
    folder = TinyDecoder(seed=1).write(tmp_path)
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "Gather" and "input_ids" in node.input:
            (table,) = (one for one in model.graph.initializer if one.name == node.input[0])
            table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:200], table.name))
    onnx.save(model, folder / "model.onnx")
    draft = Session.from_pretrained(folder, provider="cpu", threads=1)
    assert draft.rows == 200
    for prompt in (PROMPT, (*PROMPT, 250)):
        requests = [Request(prompt, options) for options in OPTIONS]
        with Engine(session, draft=draft) as engine:
            answers = engine.generate(requests)
            assert engine.alive
        for options, found in zip(OPTIONS, answers, strict=True):
            with Engine(session, LOOKUP) as engine:
                engine._batch._drafter = Guesses((), 0)  # type: ignore[attr-defined]
                assert found.token_ids == engine.generate([Request(prompt, options)])[0].token_ids
    assert not answers[0].drafted_tokens


def test_what_cannot_guess_is_refused(session: Session, tmp_path: Path) -> None:
    other = TinyDecoder(seed=1).write(tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["word"])
    tokenizer.save(str(other / "tokenizer.json"))
    draft = Session.from_pretrained(other, provider="cpu", threads=1)
    with pytest.raises(InputError, match="1 tokens of its vocabulary differ"):
        Engine(session, draft=draft)
    plain = Session.from_pretrained(
        TinyDecoder(grouped=False).write(tmp_path / "plain"), provider="cpu", threads=1
    )
    with pytest.raises(InputError, match="keeps no cache in place"):
        Engine(plain, LOOKUP)
    with pytest.raises(InputError, match="keeps no cache in place"):
        Engine(session, draft=plain)
    with pytest.raises(InputError, match="choose one of lookup and draft"):
        Engine(session, LOOKUP, session)
