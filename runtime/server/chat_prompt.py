"""From messages and tools to the tokens of a prompt, and to the schema that the answer keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rk_export.runtime.server.errors import ApiError, bad_request
from rk_export.runtime.server.json_schema import ANY_OBJECT
from rk_export.runtime.server.openai_types import ChatMessage, ChatRequest, NamedTool, Tool
from rk_export.runtime.server.opened import Decoder
from rk_export.runtime.server.tool_schema import call_schema
from rk_export.runtime.server.tools import (
    CallForm,
    for_template,
    form_of,
    message_for_template,
)

# Arguments of a template that belong to other fields.
_OWN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
_MOST_ARGUMENTS, _LONGEST_ARGUMENT = 32, 64


@dataclass(frozen=True)
class ToolUse:
    """What a model may call in its answer.

    Args:
        offered: The tools that the prompt names.
        callable: Those of which the answer must call one; empty where it is free.
        form: How the model writes calls of its own; None where it makes none.
    """

    offered: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    form: CallForm | None = None

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return bool(self.callable)

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions that the prompt shows."""
        return frozenset(tool.function.name for tool in self.offered)


def tool_use(body: ChatRequest, decoder: Decoder) -> ToolUse:
    """Return what the fields ``tools`` and ``tool_choice`` ask for.

    Raises:
        ApiError: The template has no place for tools or shows no form of calls that is known, or a name is unknown.
    """
    tools, choice = tuple(body.tools or ()), body.tool_choice
    if not tools or choice == "none":
        return ToolUse()
    if not decoder.template or not decoder.session.chat_template.reads("tools"):
        raise bad_request(
            "the chat template of this model has no place for tools", "tools", "unsupported_parameter"
        )
    if choice == "required":
        return ToolUse(tools, tools)
    if isinstance(choice, NamedTool):
        named = tuple(tool for tool in tools if tool.function.name == choice.function.name)
        if not named:
            raise bad_request(f"no tool is named {choice.function.name!r}", "tool_choice")
        return ToolUse(tools, named)
    if body.response_format is not None and body.response_format.type != "text":
        return ToolUse(tools)  # JSON that was asked for is an answer
    form = form_of(decoder.template)
    if form is None:
        raise bad_request(
            "the chat template of this model shows no form of calls that this server can read; "
            "tool_choice 'required' works",
            "tools",
            "unsupported_parameter",
        )
    return ToolUse(tools, form=form)


def schema_of(body: ChatRequest, tools: ToolUse) -> tuple[dict[str, Any], str] | None:
    """Return the JSON schema of the answer and the field that it comes from, or None where the answer is free."""
    if tools.forced:
        return call_schema(tools.callable), "tools"
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return ANY_OBJECT, "response_format"
    return wanted.json_schema.schema_, "response_format.json_schema.schema"


def chat_tokens(body: ChatRequest, decoder: Decoder, tools: ToolUse) -> list[int]:
    """Return the tokens of a conversation.

    Raises:
        ApiError: The model has no chat template, or a part of a message is no text.
        InputError: The template refuses the messages.
    """
    if not decoder.template:
        raise ApiError(
            400,
            "this model has no chat template; use /v1/completions",
            param="model",
            code="no_chat_template",
        )
    arguments = _arguments(body, decoder)
    if tools.offered:
        arguments["tools"] = for_template(tools.offered)
    knows = "developer" in decoder.template
    messages = [_message(message, index, knows) for index, message in enumerate(body.messages)]
    return decoder.session.chat_tokens(messages, **arguments)


def _arguments(body: ChatRequest, decoder: Decoder) -> dict[str, Any]:
    """Return what the client gives to the template; a name that it does not read is an error of the client."""
    found, field = dict(body.chat_template_kwargs or {}), "chat_template_kwargs"
    if len(found) > _MOST_ARGUMENTS or any(len(name) > _LONGEST_ARGUMENT for name in found):
        raise bad_request(f"give at most {_MOST_ARGUMENTS} names of {_LONGEST_ARGUMENT} characters", field)
    for name in found:
        if name in _OWN:
            raise bad_request(f"{name} has a field of its own", field)
        if not decoder.session.chat_template.reads(name):
            raise bad_request(f"the chat template of this model does not read {name!r}", field)
    return found


def _message(message: ChatMessage, index: int, knows_developer: bool) -> dict[str, Any]:
    found = message_for_template(message)
    if isinstance(message.content, list):
        found["content"] = _joined(message.content, f"messages.{index}.content")
    if message.role == "developer" and not knows_developer:
        found["role"] = "system"
    return found


def _joined(parts: list[dict[str, Any]], place: str) -> str:
    """Return the text of parts, one a line."""
    for part in parts:
        if part.get("type") != "text":
            raise bad_request(
                f"{place}: a part of type {part.get('type')!r}; this model reads text only",
                place,
                "unsupported_content",
            )
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{place}: a part of type text needs a text", place)
    return "\n".join(part["text"] for part in parts)
