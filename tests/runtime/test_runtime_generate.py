"""Generation: batches, ends, seeds, streams and chat on tiny bundles."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runtime_models import BOS, CONTEXT, EOS, VOCAB, TinyDecoder

from rk_export.errors import InputError
from rk_export.runtime import FinishReason, Generation, GenerationOptions, Session
from rk_export.runtime.generate import Row

PROMPTS = ["a", "a much longer prompt", "four"]
SAMPLED = GenerationOptions(max_new_tokens=24, temperature=1.5, top_k=50, top_p=0.95, seed=7)


def opened(folder: Path, form: TinyDecoder | None = None, eos: int | list[int] = 257) -> Session:
    return Session.from_pretrained((form or TinyDecoder()).write(folder, eos=eos), provider="cpu", threads=1)


@pytest.mark.parametrize(
    ("form", "together"),
    [
        (TinyDecoder(), True),
        (TinyDecoder(lengths="sum"), True),
        (TinyDecoder(lengths="total"), False),
        (TinyDecoder(grouped=False), False),
    ],
    ids=["own lengths", "sums of the mask", "one length", "growing cache"],
)
def test_rows_of_a_batch_equal_single_rows(tmp_path: Path, form: TinyDecoder, together: bool) -> None:
    session = opened(tmp_path, form)
    assert session.takes_slots is together
    options = GenerationOptions(max_new_tokens=20, repetition_penalty=1.3)
    singles = [session.generate(prompt, options=options)[0] for prompt in PROMPTS]
    assert session.generate(PROMPTS, options=options) == singles


def test_a_long_prompt_does_not_cut_short_what_runs_beside_it(tmp_path: Path) -> None:
    session = opened(tmp_path)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 250, length).tolist() for length in (2, CONTEXT - 3, 5, CONTEXT - 1)]
    options = GenerationOptions(max_new_tokens=8)
    together = session.generate(prompts, options=options)
    assert [len(row.token_ids) for row in together] == [8, 3, 8, 1]
    assert together == [session.generate([prompt], options=options)[0] for prompt in prompts]


def test_prompts_may_be_token_ids(tmp_path: Path) -> None:
    session = opened(tmp_path)
    tokens = [BOS, *b"four"]
    text = session.generate("four")
    assert session.generate(tokens) == text
    assert session.generate([tokens, tokens]) == text * 2
    assert text[0].prompt_tokens == 5


def test_threads_may_share_a_session(tmp_path: Path) -> None:
    session = opened(tmp_path)
    prompts = [f"prompt {index}" * (index + 1) for index in range(6)]
    alone = [session.generate(prompt, options=SAMPLED)[0] for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: session.generate(prompt, options=SAMPLED)[0], prompts * 4))
    assert together == alone * 4


def test_seed_decides_the_text(tmp_path: Path) -> None:
    session = opened(tmp_path)
    first, again = (session.generate(["x", "x"], options=SAMPLED) for _ in range(2))
    assert first == again
    assert first[0].text != first[1].text, "rows draw from different streams"
    other = GenerationOptions(max_new_tokens=24, temperature=1.5, seed=8)
    assert session.generate("x", options=other)[0].text != first[0].text


def test_end_of_sequence(tmp_path: Path) -> None:
    free = opened(tmp_path / "free").generate("abc")[0]
    assert free.finish_reason is FinishReason.LENGTH
    eos = free.token_ids[4]
    cut = free.token_ids.index(eos) + 1
    cases: list[int | list[int]] = [eos, [999, eos]]
    for index, ids in enumerate(cases):
        ended = opened(tmp_path / f"eos{index}", eos=ids).generate("abc")[0]
        assert ended.finish_reason is FinishReason.EOS
        assert ended.token_ids == free.token_ids[:cut]
        assert free.text.startswith(ended.text)


def test_rows_of_a_batch_end_on_their_own(tmp_path: Path) -> None:
    free = opened(tmp_path / "free").generate(PROMPTS)
    session = opened(tmp_path / "eos", eos=free[0].token_ids[2])
    batch = session.generate(PROMPTS)
    assert batch == [session.generate(prompt)[0] for prompt in PROMPTS]
    assert len({len(row.token_ids) for row in batch}) > 1


def test_stop_string_is_cut_off(tmp_path: Path) -> None:
    session = opened(tmp_path)
    options = GenerationOptions(max_new_tokens=40, temperature=1.0, seed=1)
    free = session.generate("abc", options=options)[0].text
    stop = free[10:13]
    stopped = session.generate("abc", options=replace(options, stop=("never", stop)))[0]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.text == free[: free.index(stop)]


@pytest.mark.parametrize("seed", range(6))
def test_stream_equals_generate(tmp_path: Path, seed: int) -> None:
    """Random bytes make many incomplete characters; the pieces join to the text all the same."""
    session = opened(tmp_path)
    options = GenerationOptions(max_new_tokens=60, temperature=2.0, seed=seed, stop=("\n", "ab"))
    pieces = list(session.stream("é", options))
    expected = session.generate("é", options=options)[0]
    assert "".join(pieces) == expected.text
    if expected.finish_reason is FinishReason.LENGTH:
        assert expected.text == session.text_codec.decode(expected.token_ids)


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.EOS])
def test_an_ending_row_gives_out_what_was_held_back(tmp_path: Path, reason: FinishReason) -> None:
    """Half a character waits for its other half, and the beginning of a stop string for its end."""
    codec = opened(tmp_path).text_codec
    for written, expected in ((b"a\xf0\x9f", codec.decode([*b"a\xf0\x9f"])), (b"see EN", "see EN")):
        options = GenerationOptions(stop=("END",), max_new_tokens=len(written) + (reason is FinishReason.EOS))
        row = Row([1], options, codec, frozenset([EOS]))
        for token in [*written, EOS] if reason is FinishReason.EOS else written:
            row.advance(np.eye(VOCAB, dtype=np.float32)[token])
        assert row.result().text == expected
        assert row.finish_reason is reason


def test_context_limits_the_generation(tmp_path: Path) -> None:
    session = opened(tmp_path)
    prompt = [1] * (CONTEXT - 3)
    assert len(session.generate(prompt)[0].token_ids) == 3
    with pytest.raises(InputError, match=f"{CONTEXT} tokens leave no room in a context of {CONTEXT}"):
        session.generate([1] * CONTEXT)
    assert session.generate([]) == []
    with pytest.raises(InputError, match="no tokens"):
        session.generate([[]])


def test_chat_renders_the_template(tmp_path: Path) -> None:
    session = opened(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    assert session.chat_tokens(messages) == [BOS, *b"[user]hi>"]
    assert session.chat(messages) == session.generate([BOS, *b"[user]hi>"])[0]
    with pytest.raises(InputError, match="no tools"):
        session.chat([{"role": "tool", "content": ""}])


def test_bundle_without_tokenizer(tmp_path: Path) -> None:
    session = Session.from_pretrained(TinyDecoder().write(tmp_path, tokenizer=False), provider="cpu")
    result = session.generate([1, 2, 3])[0]
    assert isinstance(result, Generation)
    assert result.text == ""
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        session.generate([1, 2, 3], options=GenerationOptions(stop=("x",)))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", float("nan")),
        ("temperature", float("inf")),
        ("repetition_penalty", 0.0),
        ("stop", "text"),
        ("stop", ("",)),
        ("seed", -1),
    ],
)
def test_options_out_of_range(option: str, value: object) -> None:
    with pytest.raises(InputError, match=option):
        GenerationOptions(**{option: value})  # type: ignore[arg-type]
