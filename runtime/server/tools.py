"""Calls of functions in a model's text: the forms that chat templates teach, read back into OpenAI's."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from rk_export.runtime.server.openai_types import ChatMessage, Tool
from rk_export.runtime.text import TextCodec

_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """One call.

    Args:
        name: The function.
        arguments: Its arguments as JSON text; empty where the model wrote none.
    """

    name: str
    arguments: str

    def for_openai(self, index: int | None = None) -> dict[str, Any]:
        """Return the call in OpenAI's form; pieces of a stream carry an index."""
        numbered = {} if index is None else {"index": index}
        function = {"name": self.name, "arguments": self.arguments}
        return {**numbered, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


@dataclass(frozen=True)
class CallForm:
    """How a model writes calls.

    Args:
        begin: What stands before a call; a text that begins with the JSON itself where it is empty.
        end: What stands behind it, often left out by the model.
    """

    begin: str
    end: str = ""

    def split(self, text: str, names: Collection[str]) -> tuple[str, list[Call]]:
        """Return the text before the calls, and the calls; no calls where one of them is malformed.

        Args:
            text: What the model wrote.
            names: The functions that it may call. JSON with another name is text.
        """
        start = text.find(self.begin)
        if start < 0 or (not self.begin and not text.lstrip().startswith("{")):
            return text, []
        before, rest = text[:start], text[start:]
        calls: list[Call] = []
        while rest := rest.strip():
            if not rest.startswith(self.begin):
                return (before, calls) if self.end and calls else (text, [])
            found = _decoded(rest.removeprefix(self.begin).lstrip())
            if found is None or not all(self._is_meant(call, names) for call in found[0]):
                return text, []
            more, rest = found
            calls += [Call(call.name, call.arguments or "{}") for call in more]
            rest = rest.lstrip().removeprefix(self.end) if self.end else rest.lstrip(" \n;")
        return before.rstrip(), calls

    def _is_meant(self, call: Call, names: Collection[str]) -> bool:
        """Whether JSON is a call: without a mark before it, it may be an answer that happens to have a name."""
        return call.name in names and (bool(self.begin) or bool(call.arguments))


# The first form that a template shows is the model's; the last one is that of Llama 3.
_FORMS = (
    ("<tool_call>", CallForm("<tool_call>", "</tool_call>")),
    ("[TOOL_CALLS]", CallForm("[TOOL_CALLS]")),
    ('"parameters":', CallForm("")),
)


def form_of(template: str) -> CallForm | None:
    """Return how the model of a chat template writes calls, or None where it shows no form that we know."""
    return next((form for mark, form in _FORMS if mark in template), None)


def whole_text(codec: TextCodec, tokens: Sequence[int], ends: frozenset[int]) -> str:
    """Return the text of tokens with the special tokens between them: some forms begin with one."""
    parts: list[str] = []
    run: list[int] = []
    for token in tokens:
        if special := codec.hidden_text(token):
            parts += [codec.decode(run), "" if token in ends else special]
            run = []
        else:
            run.append(token)
    return "".join([*parts, codec.decode(run)])


def parse_call(text: str) -> list[Call]:
    """Return the call that an answer kept to `call_schema` is; none where it was cut short."""
    found = _decoded(text.strip())
    return [] if found is None else found[0]


def for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the tools as chat templates read them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]


def message_for_template(message: ChatMessage) -> dict[str, Any]:
    """Return a message as chat templates read it: texts joined, arguments of calls as objects."""
    plain = message.model_dump(
        exclude_none=True, exclude={"refusal", "annotations", "audio", "function_call"}
    )
    plain.setdefault("content", None if message.tool_calls else "")
    for call in plain.get("tool_calls", ()):
        call.pop("index", None)
        call["function"]["arguments"] = _object_or_text(call["function"]["arguments"])
    return plain


def _decoded(text: str) -> tuple[list[Call], str] | None:
    """Return the calls in the JSON at the begin of a text and what follows, or None where there are none."""
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    calls = [_call(item) for item in (value if isinstance(value, list) else [value])]
    found = [call for call in calls if call is not None]
    return (found, text[end:]) if found and len(found) == len(calls) else None


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", ""))
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(value["name"], written)


def _object_or_text(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
