"""Bodies that are wrong many times over, and the place and the words of what is told about one misfit."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from rk_export.runtime.server import reading
from rk_export.runtime.server.errors import ApiError
from rk_export.runtime.server.openai_types import ChatRequest, CompletionRequest, EmbeddingRequest

MANY = 3000
PROMPT: dict[str, Any] = {"model": "m", "prompt": "x"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def refusal(kind: type[BaseModel], body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as found:
        reading.parse(json.dumps(body).encode(), kind)
    return found.value


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {**PROMPT, "prompt": [{}] * MANY}),
        (CompletionRequest, {**PROMPT, "prompt": [[{}] * MANY] * 3}),
        (CompletionRequest, {**PROMPT, "stop": [{}] * MANY}),
        (CompletionRequest, {**PROMPT, "stop_token_ids": ["1"] * MANY}),
        (CompletionRequest, {**PROMPT, **{f"field{number}": 1 for number in range(MANY)}}),
        (EmbeddingRequest, {"model": "m", "input": [{}] * MANY}),
        (ChatRequest, {**CHAT, "messages": [{}] * MANY}),
        (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": [1] * MANY}]}),
        (ChatRequest, {**CHAT, "messages": [{"role": "user", "tool_calls": [{}] * MANY}]}),
        (ChatRequest, {**CHAT, "tools": [{}] * MANY}),
        (
            ChatRequest,
            {**CHAT, "messages": [{"role": "user", **{f"f{number}": 1 for number in range(MANY)}}]},
        ),
    ],
)
def test_a_body_full_of_misfits_makes_few_errors(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseModel], body: dict[str, Any]
) -> None:
    counts = []
    misfit = reading.misfit

    def counted(error: ValidationError, value: Any = None) -> ApiError:
        counts.append(error.error_count())
        return misfit(error, value)

    monkeypatch.setattr(reading, "misfit", counted)
    tracemalloc.start()
    try:
        found = refusal(kind, body)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert found.status == 400
    assert counts[0] <= 8


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {**PROMPT, "stop_token_ids": [1] * 65}),
        (CompletionRequest, {**PROMPT, "stop": ["x"] * 17}),
        (ChatRequest, {**CHAT, "messages": CHAT["messages"] * 4097}),
    ],
)
def test_lists_have_a_length_that_is_known(kind: type[BaseModel], body: dict[str, Any]) -> None:
    assert "List should have at most" in refusal(kind, body).message


@pytest.mark.parametrize(
    ("kind", "more", "param", "message"),
    [
        (CompletionRequest, {"prompt": {"a": 1}}, "prompt", "Input should be a valid string or a valid list"),
        (CompletionRequest, {"prompt": [1, "a"]}, "prompt.1", "Input should be a valid integer"),
        (CompletionRequest, {"prompt": ["a", 1]}, "prompt.1", "Input should be a valid string"),
        (CompletionRequest, {"prompt": [[1], ["a"]]}, "prompt.1.0", "Input should be a valid integer"),
        (CompletionRequest, {"prompt": [1, -1]}, "prompt.1", "greater than or equal to 0"),
        (CompletionRequest, {"prompt": [[1 << 70]]}, "prompt.0.0", "less than 2147483648"),
        (CompletionRequest, {"stop": [5]}, "stop.0", "Input should be a valid string"),
        (ChatRequest, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "a valid list"),
        (ChatRequest, {"messages": [{"content": "x"}]}, "messages.0.role", "Field required"),
        (ChatRequest, {"tool_choice": "all"}, "tool_choice", "Input should be 'none', 'auto' or 'required'"),
        (ChatRequest, {"tool_choice": {"type": "function"}}, "tool_choice.function", "Field required"),
        (ChatRequest, {"stream_options": 5}, "stream_options", "Input should be a valid dictionary"),
        (ChatRequest, {"stream_options": {"loud": True}}, "stream_options.loud", "not known"),
    ],
)
def test_a_misfit_is_told_by_its_place_in_the_body(
    kind: type[BaseModel], more: dict[str, Any], param: str, message: str
) -> None:
    found = refusal(kind, {**(PROMPT if kind is CompletionRequest else CHAT), **more})
    assert found.param == param
    assert message in found.message
    assert "[" not in found.message
    assert "instance" not in found.message
