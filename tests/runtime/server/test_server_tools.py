"""Calls in a model's text, in the forms that chat templates teach: whole, and in pieces that come one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, checked, serving, streamed, write_decoder

from rk_export.runtime.engine import Answer, Piece, Request
from rk_export.runtime.options import FinishReason
from rk_export.runtime.server.tools import Call, CallForm, form_of

HERMES = CallForm("<tool_call>", "</tool_call>")
MISTRAL = CallForm("[TOOL_CALLS]")
LLAMA = CallForm("")
DAY = Call("weather", '{"day": "today"}')
TIDE = Call("tide", "{}")
ONE = '{"name": "weather", "arguments": {"day": "today"}}'


@pytest.mark.parametrize(
    ("form", "text", "before", "calls"),
    [
        (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [DAY]),
        (HERMES, f"I look.\n<tool_call>{ONE}</tool_call>", "I look.", [DAY]),
        (
            HERMES,
            f'<tool_call>{ONE}</tool_call>\n<tool_call>{{"name": "tide", "arguments": {{}}}}</tool_call>',
            "",
            [DAY, TIDE],
        ),
        (HERMES, f"<tool_call>{ONE}", "", [DAY]),  # many models end with the JSON
        (HERMES, "<tool_call>{broken", "<tool_call>{broken", []),
        (HERMES, '<tool_call>{"no": "name"}</tool_call>', '<tool_call>{"no": "name"}</tool_call>', []),
        (HERMES, ONE, ONE, []),
        (HERMES, "nothing", "nothing", []),
        (MISTRAL, f'[TOOL_CALLS] [{ONE}, {{"name": "tide", "arguments": {{}}}}]', "", [DAY, TIDE]),
        (MISTRAL, "[TOOL_CALLS] [1]", "[TOOL_CALLS] [1]", []),
        (LLAMA, '{"name": "weather", "parameters": {"day": "today"}}', "", [DAY]),
        (LLAMA, '{"name": "tide", "parameters": {}}; ' + ONE, "", [TIDE, DAY]),
        (LLAMA, '{"answer": 5}', '{"answer": 5}', []),
        (LLAMA, '{"name": "Ada", "arguments": {}}', '{"name": "Ada", "arguments": {}}', []),
        (LLAMA, '{"name": "tide"}', '{"name": "tide"}', []),
        (LLAMA, '{"name": "tide", "arguments": {}}', "", [TIDE]),
        (HERMES, '<tool_call>{"name": "tide"}', "", [TIDE]),  # its mark says that it is a call
        (
            HERMES,
            '<tool_call>{"name": "Ada", "arguments": {}}',
            '<tool_call>{"name": "Ada", "arguments": {}}',
            [],
        ),
        (LLAMA, f"Say {ONE}", f"Say {ONE}", []),
        (HERMES, '<tool_call>{"name": "tide", "arguments": "{}"}', "", [TIDE]),
    ],
)
def test_calls_are_read(form: CallForm, text: str, before: str, calls: list[Call]) -> None:
    assert form.split(text, {"weather", "tide"}) == (before, calls)


def test_the_form_is_the_one_that_the_template_shows() -> None:
    assert form_of("{{ '<tool_call>' }}") == HERMES
    assert form_of("[TOOL_CALLS]") == MISTRAL
    assert form_of('Respond as {"name": function name, "parameters": dictionary}') == LLAMA
    assert form_of("nothing of that kind {{ tools }}") is None


class Scripted:
    """An engine whose answer is a text, one byte a token."""

    slots = 1

    def __init__(self, text: str) -> None:
        self._tokens = tuple(text.encode())

    def submit(self, request: Request, listener: Callable[[Any], None]) -> Scripted:
        for token in self._tokens:
            listener(Piece(chr(token), (token,)))
        text = bytes(self._tokens).decode()
        listener(Answer(text, self._tokens, FinishReason.EOS, len(request.prompt)))
        return self

    def cancel(self) -> None:
        pass


TEMPLATES = {
    HERMES.begin: "{{ tools }}<tool_call>",
    MISTRAL.begin: "{{ tools }}[TOOL_CALLS]",
    LLAMA.begin: '{{ tools }}{"name": x, "parameters": y}',
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    base = tmp_path_factory.mktemp("bundles")
    names = {begin: f"model{number}" for number, begin in enumerate(TEMPLATES)}
    folders: dict[str, Path] = {
        names[begin]: write_decoder(base / names[begin], template=template)
        for begin, template in TEMPLATES.items()
    }
    with serving(folders) as running:
        yield running


@pytest.mark.parametrize(
    ("number", "text", "content", "names"),
    [
        (0, f"I look. <tool_call>{ONE}</tool_call>", "I look.", ["weather"]),
        (0, "a < b <tool", "a < b <tool", []),
        (0, "<tool_call>{broken", "<tool_call>{broken", []),
        (1, f"[TOOL_CALLS] [{ONE}]", "", ["weather"]),
        (2, '  {"name": "weather", "parameters": {}}', "", ["weather"]),
        (2, '{"x": 1}', '{"x": 1}', []),
        (2, '{"name": "Ada", "arguments": {}}', '{"name": "Ada", "arguments": {}}', []),
        (2, '{"name": "weather"}', '{"name": "weather"}', []),
        (2, "Hello {you}", "Hello {you}", []),
    ],
)
def test_calls_leave_the_text_whole_and_streamed(
    server: Running, monkeypatch: pytest.MonkeyPatch, number: int, text: str, content: str, names: list[str]
) -> None:
    decoder = server.decoder(f"model{number}")
    object.__setattr__(decoder, "engine", Scripted(text))
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "?"}]
    body = {"model": f"model{number}", "messages": messages, "tools": [tool], "max_tokens": 300}
    whole = checked(server.post("/v1/chat/completions", body).json())["choices"][0]
    assert (whole["message"]["content"] or "") == content
    assert [c["function"]["name"] for c in whole["message"].get("tool_calls", [])] == names
    assert whole["finish_reason"] == ("tool_calls" if names else "stop")
    parts = streamed(server.post("/v1/chat/completions", {**body, "stream": True}).iter_lines())
    assert parts.text().rstrip() == content
    deltas = [choice for chunk in parts.chunks for choice in chunk["choices"]]
    calls = [call for delta in deltas for call in delta["delta"].get("tool_calls", [])]
    assert [call["function"]["name"] for call in calls] == names
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
    assert deltas[-1]["finish_reason"] == ("tool_calls" if names else "stop")


@pytest.mark.parametrize("number", [0, 2])
def test_json_that_was_asked_for_is_no_call(server: Running, number: int) -> None:
    text = ONE if number == 2 else f"<tool_call>{ONE}</tool_call>"
    object.__setattr__(server.decoder(f"model{number}"), "engine", Scripted(text))
    tool = {"type": "function", "function": {"name": "weather"}}
    body = {"model": f"model{number}", "messages": [{"role": "user", "content": "?"}], "tools": [tool]}
    body["response_format"] = {"type": "json_object"}
    choice = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["message"]["content"] == text
    assert "tool_calls" not in choice["message"]
    assert streamed(server.post("/v1/chat/completions", {**body, "stream": True}).iter_lines()).text() == text


def test_one_call_alone_on_request(server: Running) -> None:
    text = f"<tool_call>{ONE}</tool_call><tool_call>{ONE}</tool_call>"
    object.__setattr__(server.decoder("model0"), "engine", Scripted(text))
    tool = {"type": "function", "function": {"name": "weather"}}
    body = {"model": "model0", "messages": [{"role": "user", "content": "?"}], "tools": [tool]}
    counts = {}
    for several in (True, False):
        answer = server.post("/v1/chat/completions", {**body, "parallel_tool_calls": several}).json()
        counts[several] = len(answer["choices"][0]["message"]["tool_calls"])
    assert counts == {True: 2, False: 1}
