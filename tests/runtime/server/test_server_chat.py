"""`/v1/chat/completions` over HTTP: OpenAI's client and types, against what the session itself gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from serving import TOOL_TEMPLATE, Running, checked, error_of, serving, streamed, write_decoder

from rk_export.runtime import GenerationOptions, Session

HELLO = [{"role": "user", "content": "Where is the harbour?"}]
BODY = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"enum": ["north", "south"]},
        "depth": {"type": "integer", "minimum": 0, "maximum": 99},
        "open": {"type": "boolean"},
    },
    "required": ["place", "depth", "open"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a day.",
        "parameters": {
            "type": "object",
            "properties": {"day": {"enum": ["today", "tomorrow"]}},
            "required": ["day"],
            "additionalProperties": False,
        },
    },
}
TIDE = {"type": "function", "function": {"name": "tide", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("bundles")
    plain = write_decoder(base / "none")
    (plain / "chat_template.jinja").unlink()
    return {
        "tiny": write_decoder(base / "tiny", ends=True),
        "tools": write_decoder(base / "tools", template=TOOL_TEMPLATE, ends=True),
        "none": plain,
    }


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[Running]:
    with serving(folders) as running:
        yield running


@pytest.fixture(scope="module")
def session(folders: dict[str, Path]) -> Session:
    return Session.from_pretrained(folders["tiny"], provider="cpu", threads=1)


def ask(server: Running, **more: Any) -> dict[str, Any]:
    answer = server.post("/v1/chat/completions", {**BODY, **more})
    assert answer.status_code == 200, answer.text
    return checked(answer.json())


def ask_streamed(server: Running, **more: Any) -> Any:
    return streamed(server.post("/v1/chat/completions", {**BODY, **more, "stream": True}).iter_lines())


def test_an_answer_is_that_of_the_session(server: Running, session: Session) -> None:
    expected = session.chat(HELLO, GenerationOptions(max_new_tokens=12))
    for field in ("max_tokens", "max_completion_tokens"):
        body = {**{key: value for key, value in BODY.items() if key != "max_tokens"}, field: 12}
        found = server.client().chat.completions.create(**body)
        assert found.choices[0].message.content == expected.text
        assert found.usage is not None
        assert found.usage.prompt_tokens == expected.prompt_tokens
        assert found.usage.prompt_tokens_details is not None
    assert ask_streamed(server).text() == expected.text
    parts = server.client().chat.completions.create(**BODY, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected.text


def test_a_stream_has_the_usage_of_the_whole(server: Running) -> None:
    whole = ask(server, n=2, temperature=1, seed=5)
    found = ask_streamed(server, n=2, temperature=1, seed=5, stream_options={"include_usage": True})
    assert [found.text(index) for index in (0, 1)] == [c["message"]["content"] for c in whole["choices"]]
    usage = dict(found.chunks[-1]["usage"])
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert usage["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert found.chunks[0]["choices"][0]["delta"]["role"] == "assistant"


def test_parts_and_roles_reach_the_template(server: Running, session: Session) -> None:
    parts = [{"type": "text", "text": "Where is"}, {"type": "text", "text": "the harbour?"}]
    given = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    same = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is\nthe harbour?"}]
    expected = session.chat(same, GenerationOptions(max_new_tokens=12)).text
    assert ask(server, messages=given)["choices"][0]["message"]["content"] == expected


def test_arguments_reach_the_template(server: Running) -> None:
    plain = ask(server, model="tools")
    moody = ask(server, model="tools", chat_template_kwargs={"mood": "merry"})
    assert moody["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] + len("merry")


@pytest.mark.parametrize(
    "arguments", [{"self": 1}, {"colour": 1}, {"m" * 65: 1}, {f"mood{number}": 1 for number in range(33)}]
)
def test_arguments_that_the_template_does_not_read_leave_no_trace(
    server: Running, caplog: pytest.LogCaptureFixture, arguments: dict[str, Any]
) -> None:
    template = server.decoder("tools").session.chat_template
    before = set(template._warned)
    answer = server.post(
        "/v1/chat/completions", {**BODY, "model": "tools", "chat_template_kwargs": arguments}
    )
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "chat_template_kwargs"
    assert len(answer.text) < 300
    assert template._warned == before
    assert not any(name in record.getMessage() for name in arguments for record in caplog.records)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_keeps_a_json_schema(server: Running, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "harbour", "schema": SCHEMA, "strict": True}}
    for seed in range(4):
        more = {"response_format": form, "temperature": 1.5, "seed": seed, "max_tokens": 900}
        if stream:
            text = ask_streamed(server, **more).text()
        else:
            choice = ask(server, **more)["choices"][0]
            text = choice["message"]["content"]
            assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)


def test_samples_keep_the_schema_each(server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "harbour", "schema": SCHEMA}}
    found = ask(server, response_format=form, temperature=2, seed=1, n=4, max_tokens=900)
    texts = [choice["message"]["content"] for choice in found["choices"]]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1


def test_any_object(server: Running) -> None:
    found = ask(server, response_format={"type": "json_object"}, temperature=1, seed=2, max_tokens=700)
    choice = found["choices"][0]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    else:
        assert choice["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=["required", "named"]
)
def test_a_call_that_must_be_made_is_made(server: Running, choice: Any, stream: bool) -> None:
    more = {"model": "tools", "tools": [WEATHER, TIDE], "tool_choice": choice, "max_tokens": 900}
    if stream:
        chunks = ask_streamed(server, **more).chunks
        deltas = [chunk["choices"][0] for chunk in chunks]
        calls = [call for delta in deltas for call in delta["delta"].get("tool_calls") or []]
        assert deltas[-1]["finish_reason"] == "tool_calls"
        assert not any(delta["delta"].get("content") for delta in deltas)
    else:
        found = ask(server, **more)["choices"][0]
        assert found["finish_reason"] == "tool_calls"
        assert found["message"]["content"] is None
        calls = found["message"]["tool_calls"]
    (call,) = calls
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, TIDE)}
    jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])
    if choice != "required":
        assert call["function"]["name"] == "weather"


def test_tools_reach_the_template_unless_none_may_be_called(server: Running) -> None:
    plain = ask(server, model="tools")["usage"]["prompt_tokens"]
    auto = ask(server, model="tools", tools=[WEATHER])["usage"]["prompt_tokens"]
    none = ask(server, model="tools", tools=[WEATHER], tool_choice="none")["usage"]["prompt_tokens"]
    assert (auto, none) == (plain + len("[tools]weather<tool_call>"), plain)


def test_a_conversation_with_calls_is_taken_back(server: Running) -> None:
    more = {"model": "tools", "tools": [WEATHER], "tool_choice": "required", "max_tokens": 900}
    message = ask(server, **more)["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
    again = ask(server, model="tools", tools=[WEATHER], messages=[*HELLO, message, result])
    assert again["usage"]["prompt_tokens"] > len("sunny")


def test_log_probabilities(server: Running) -> None:
    completion = {"model": "tiny", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    prompt = "<bos>[user]Where is the harbour?>"
    tokens = [256, *prompt.removeprefix("<bos>").encode()]
    expected = server.post("/v1/completions", {**completion, "prompt": tokens}).json()["choices"][0][
        "logprobs"
    ]
    found = ask(server, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in found] == expected["token_logprobs"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in found)
    assert all(bytes(entry["bytes"]).decode("utf-8", "replace") for entry in found)
    chunks = ask_streamed(server, logprobs=True).chunks
    scores = [choice["logprobs"]["content"] for c in chunks for choice in c["choices"] if choice["logprobs"]]
    assert [entry["logprob"] for part in scores for entry in part] == expected["token_logprobs"]


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "no tools"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"tools": [WEATHER]}, "no place for tools"),
        ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools"),
        ({"model": "tools", "tools": [WEATHER], "tool_choice": "all"}, "tool_choice"),
        (
            {
                "model": "tools",
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "x"}},
            },
            "tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "spoon"}},
                }
            },
            "schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:1/x"}},
                }
            },
            "schema",
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"model": "none"}, "no chat template"),
        ({"model": 5}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server: Running, more: dict[str, Any], where: str) -> None:
    answer = server.post("/v1/chat/completions", {**BODY, **more})
    assert answer.status_code == 400, answer.text
    found = error_of(answer)
    assert where in f"{found['param']} {found['message']}"
    assert "/" not in found["message"].replace("/v1/", "").replace("http://127.0.0.1:1/x", "")


def test_neutral_fields_are_taken(server: Running) -> None:
    neutral = {
        **{"user": "me", "metadata": {}, "store": True, "service_tier": "auto", "modalities": ["text"]},
        **{"frequency_penalty": 0, "tools": [], "response_format": {"type": "text"}, "stream": False},
        **{"parallel_tool_calls": True, "seed": None, "stop": None, "n": 1, "logprobs": False},
    }
    assert ask(server, **neutral)["choices"] == ask(server)["choices"]


def test_the_client_parses_into_its_own_models(server: Running) -> None:
    """`chat.completions.parse` sends a schema made by pydantic and reads the answer into it."""
    from pydantic import BaseModel

    class Harbour(BaseModel):
        open: bool
        place: Literal["north", "south"]

    found = server.client().chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Harbour, max_tokens=900, temperature=1, seed=1
    )
    assert isinstance(found.choices[0].message.parsed, Harbour)


def test_a_body_must_be_named_json(server: Running) -> None:
    data = json.dumps(BODY)
    url = f"{server.url}/v1/chat/completions"
    assert (
        httpx.post(url, content=data, headers={"Content-Type": "application/json; charset=utf-8"}).status_code
        == 200
    )
    for headers in ({}, {"Content-Type": "text/plain"}):
        wrong = httpx.post(url, content=data, headers=headers)
        assert wrong.status_code == 415
        assert error_of(wrong)["code"] == "unsupported_media_type"
