"""`/v1/completions` over HTTP: OpenAI's client and types, against what the session itself gives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from serving import CPU, Running, checked, error_of, serving, streamed, write_decoder

from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine import EngineOptions

PROMPTS = ["The harbour", "A", "Ships come and go.", "0123456789" * 4]
BODY = {"model": "tiny", "prompt": "The harbour", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving({"tiny": folder}) as running:
        yield running


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return Session.from_pretrained(folder, provider="cpu", threads=1)


def greedy(session: Session, prompt: Any, tokens: int = 12, **more: Any) -> Any:
    return session.generate([prompt], options=GenerationOptions(max_new_tokens=tokens, **more))[0]


def test_an_answer_is_that_of_the_session(server: Running, session: Session) -> None:
    for prompt in PROMPTS:
        found = server.client().completions.create(**{**BODY, "prompt": prompt})
        expected = greedy(session, prompt)
        (choice,) = found.choices
        assert choice.text == expected.text
        assert choice.finish_reason == "length"
        assert found.usage is not None
        counts = (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens)
        assert counts == (expected.prompt_tokens, 12, expected.prompt_tokens + 12)


def test_several_prompts_as_texts_or_tokens(server: Running, session: Session) -> None:
    tokens = [session.text_codec.encode(prompt) for prompt in PROMPTS]
    expected = [greedy(session, prompt).text for prompt in PROMPTS]
    for prompt in (PROMPTS, tokens):
        found = checked(server.post("/v1/completions", {**BODY, "prompt": prompt}).json())
        assert [choice["text"] for choice in found["choices"]] == expected
        assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
        assert found["usage"]["prompt_tokens"] == sum(map(len, tokens))
    single = checked(server.post("/v1/completions", {**BODY, "prompt": tokens[2]}).json())
    assert single["choices"][0]["text"] == expected[2]


def test_a_stream_gives_the_same_text_and_its_usage(server: Running) -> None:
    whole = server.post("/v1/completions", {**BODY, "prompt": PROMPTS}).json()
    body = {**BODY, "prompt": PROMPTS, "stream": True, "stream_options": {"include_usage": True}}
    found = streamed(server.post("/v1/completions", body).iter_lines())
    assert found.done
    assert [found.text(index) for index in range(4)] == [choice["text"] for choice in whole["choices"]]
    *pieces, last = found.chunks
    assert last["usage"] == whole["usage"]
    assert last["choices"] == []
    assert all(chunk["usage"] is None for chunk in pieces)
    ends = [choice["finish_reason"] for chunk in pieces for choice in chunk["choices"]]
    assert [end for end in ends if end is not None] == ["length"] * 4


def test_openais_client_reads_the_stream(server: Running, session: Session) -> None:
    chunks = server.client().completions.create(**BODY, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == greedy(session, "The harbour").text


def test_openais_asynchronous_client(server: Running, session: Session) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            whole = await client.completions.create(**BODY)
            parts = await client.completions.create(**BODY, stream=True)
            return whole.choices[0].text, "".join([part.choices[0].text async for part in parts])

    expected = greedy(session, "The harbour").text
    assert asyncio.run(ask()) == (expected, expected)


def test_samples_draw_from_streams_of_one_seed(server: Running, session: Session) -> None:
    body = {**BODY, "temperature": 1.5, "seed": 7, "n": 3}
    first, again = (server.post("/v1/completions", body).json() for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert len(set(texts)) == 3
    assert texts[0] == greedy(session, "The harbour", temperature=1.5, seed=7).text
    assert first["usage"]["prompt_tokens"] == 12
    assert first["usage"]["completion_tokens"] == 36
    negative = [server.post("/v1/completions", {**body, "seed": -1}).json()["choices"] for _ in range(2)]
    assert negative[0] == negative[1]
    assert negative[0] != first["choices"]


@pytest.mark.parametrize(
    "more",
    [
        {"top_k": 3},
        {"top_p": 0.4},
        {"min_p": 0.3},
        {"repetition_penalty": 1.8},
        {"temperature": 0.7},
        {"stop_token_ids": [75]},
    ],
)
def test_options_mean_what_they_mean_in_the_session(
    server: Running, session: Session, more: dict[str, Any]
) -> None:
    body = {**BODY, "temperature": 1.5, "seed": 3, "max_tokens": 24}
    found = server.post("/v1/completions", {**body, **more}).json()["choices"][0]["text"]
    options = {"temperature": 1.5, "seed": 3, **more}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    assert found == greedy(session, "The harbour", 24, **options).text
    assert found != server.post("/v1/completions", body).json()["choices"][0]["text"]


def test_a_stop_string_ends_the_text(server: Running, session: Session) -> None:
    text = greedy(session, "The harbour").text
    stop = text[4:6]
    for stops in (stop, [stop, "never"]):
        choice = server.post("/v1/completions", {**BODY, "stop": stops}).json()["choices"][0]
        assert choice["text"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"


def test_the_prompt_is_repeated_on_request(server: Running, session: Session) -> None:
    expected = "The harbour" + greedy(session, "The harbour").text
    tokens = session.text_codec.encode("The harbour")
    for prompt in ("The harbour", tokens):
        assert server.post("/v1/completions", {**BODY, "prompt": prompt, "echo": True}).json()["choices"][0][
            "text"
        ] in (expected, expected.removeprefix("<bos>"))
    lines = server.post("/v1/completions", {**BODY, "echo": True, "stream": True}).iter_lines()
    assert streamed(lines).text() == expected


def test_log_probabilities_are_those_of_the_logits(server: Running, session: Session) -> None:
    found = checked(server.post("/v1/completions", {**BODY, "logprobs": 3}).json())["choices"][0]["logprobs"]
    expected = greedy(session, "The harbour")
    tokens = [*session.text_codec.encode("The harbour"), *expected.token_ids]
    logits = session.prefill_logits(np.array([tokens]))[0].astype(np.float64)[-13:-1]
    logs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    logs -= logits.max(1, keepdims=True)
    chosen = logs[np.arange(12), list(expected.token_ids)]
    np.testing.assert_allclose(found["token_logprobs"], chosen, atol=1e-4)
    for row, top in zip(logs, found["top_logprobs"], strict=True):
        np.testing.assert_allclose(sorted(top.values()), np.sort(row)[-3:], atol=1e-4)
    assert found["text_offset"][0] == 0
    lines = server.post("/v1/completions", {**BODY, "logprobs": 3, "stream": True}).iter_lines()
    parts = [choice["logprobs"] for chunk in streamed(lines).chunks for choice in chunk["choices"]]
    values = [value for part in parts for value in part["token_logprobs"]]
    np.testing.assert_allclose(values, found["token_logprobs"], atol=1e-6)


def test_neighbours_do_not_change_an_answer(server: Running, session: Session) -> None:
    prompts = [f"Client {number} asks: {'why? ' * number}" for number in range(8)]
    expected = [greedy(session, prompt, 40).text for prompt in prompts]

    def ask(prompt: str) -> str:
        body = {**BODY, "prompt": prompt, "max_tokens": 40, "stream": len(prompt) % 2 == 0}
        answer = server.post("/v1/completions", body)
        return streamed(answer.iter_lines()).text() if body["stream"] else answer.json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, prompts)) == expected


def test_the_answer_ends_where_the_context_ends(folder: Path) -> None:
    options = EngineOptions(slots=1, queue=1, capacity=32)
    with serving({"tiny": folder}, engine=options, session=CPU) as server:
        fits = server.post("/v1/completions", {**BODY, "max_tokens": 20})
        assert fits.json()["usage"]["completion_tokens"] == 20
        refused = server.post("/v1/completions", {**BODY, "max_tokens": 21})
        assert refused.status_code == 400
        assert error_of(refused)["code"] == "context_length_exceeded"
        long = server.post("/v1/completions", {**BODY, "prompt": "x" * 40, "max_tokens": 1})
        assert error_of(long)["code"] == "context_length_exceeded"
        unsized = {"model": "tiny", "prompt": "x" * 40}
        assert error_of(server.post("/v1/completions", unsized))["param"] == "prompt"
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        answer = server.post("/v1/chat/completions", chat).json()
        assert answer["usage"]["total_tokens"] == 32
        chat["messages"] = [{"role": "user", "content": "x" * 40}]
        assert error_of(server.post("/v1/chat/completions", chat))["param"] == "messages"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"nonsense": 1}, "nonsense"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [5000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x" * 1000]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": 99}, "logprobs"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server: Running, more: dict[str, Any], param: str) -> None:
    answer = server.post("/v1/completions", {**BODY, **more})
    assert answer.status_code == 400
    found = error_of(answer)
    assert found["type"] == "invalid_request_error"
    assert param in (found["param"] or found["message"])


def test_fields_that_change_nothing_are_taken(server: Running) -> None:
    neutral = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "suffix": None,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "best_of": 1,
    }
    plain = server.post("/v1/completions", BODY).json()["choices"]
    assert server.post("/v1/completions", {**BODY, **neutral}).json()["choices"] == plain


def test_openais_client_raises_its_own_errors(server: Running) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError) as absent:
        client.completions.create(model="absent", prompt="x")
    assert absent.value.code == "model_not_found"
    assert "tiny" in str(absent.value)
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(**BODY, frequency_penalty=1)
    assert bad.value.param == "frequency_penalty"


def test_models_are_listed(server: Running) -> None:
    listed = checked(server.get("/v1/models").json())
    assert [entry["id"] for entry in listed["data"]] == ["tiny"]
    assert server.client().models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server.url}/v1/models/absent").status_code == 404
