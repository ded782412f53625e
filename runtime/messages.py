"""Messages of a conversation, brought into the form in which transformers shows them to a chat template."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from rk_export.errors import InputError

# A message's reasoning goes by several names; templates read the first, those of gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_OPEN_END = "rkOpenEnd"  # stands behind the last message until what the template adds to it is cut off


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return copies without the fields that are None, and with reasoning under the names that templates read."""
    return [
        _with_reasoning({key: value for key, value in message.items() if value is not None})
        for message in messages
    ]


def in_blocks(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose texts stand in the blocks that templates of models for images read."""
    return [
        {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content := message.get("content"), str)
        else message
        for message in messages
    ]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def opened(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with a mark at the end of the last one's text.

    Raises:
        InputError: There is no message, or the last one has no text.
    """
    chat = copy.deepcopy(list(messages))
    last = chat[-1] if chat else {}
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = f"{content}{_OPEN_END} "
        return chat
    blocks = [block for block in content or () if isinstance(block, dict) and "text" in block]
    if not blocks:
        raise InputError(
            "the last message has no text", where="continue_final_message", fix="give it the text to continue"
        )
    blocks[-1]["text"] = f"{blocks[-1]['text']}{_OPEN_END} "
    return chat


def continued(rendered: str, messages: Sequence[dict[str, Any]]) -> str:
    """Return a rendered conversation up to the end of its last message's text.

    Args:
        rendered: What the template made of `opened(messages)`.
        messages: The messages.

    Raises:
        InputError: The template left out the end of the last message.
    """
    text, mark, rest = rendered.rpartition(_OPEN_END)
    if not mark or _last_text(messages).strip() not in text:
        raise InputError(
            f"the template does not write the last message, of role {messages[-1].get('role')!r}, as it is",
            where="continue_final_message",
            fix="let the last message be the assistant's, without what the template leaves out",
        )
    return (
        text if rest.startswith(" ") else text.rstrip()
    )  # without the space, the template trims its messages


def _last_text(messages: Sequence[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else next(b["text"] for b in reversed(content) if "text" in b)
