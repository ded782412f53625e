"""Reads what a request to Triton asks for out of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rk_export.errors import InputError
from rk_export.json_codec import parse_json
from rk_export.runtime.options import GenerationOptions
from rk_export.runtime.triton.tensors import INPUTS

if TYPE_CHECKING:
    from rk_export.runtime.session import Session

_NAMES = tuple(tensor.name for tensor in INPUTS)
_MANY = {tensor.name for tensor in INPUTS if tensor.many}
_OPTIONS = {
    "max_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_p", "top_k", "seed", "stop")},
}
_OF_TRITON = "triton_"  # with which clients steer the server


@dataclass(frozen=True)
class Ask:
    """What one request asks for.

    Args:
        prompt: A text to continue, or the messages of a conversation to answer.
        options: How to choose tokens and when to end.
        stream: Whether the answer comes piece by piece.
    """

    prompt: str | list[dict[str, Any]]
    options: GenerationOptions
    stream: bool

    @classmethod
    def read(cls, tensors: Mapping[str, np.ndarray], parameters: Iterable[str] = ()) -> Ask:
        """Read the tensors of a request.

        Args:
            tensors: By name, those that are there; texts as bytes.
            parameters: Names of what the request brings beside its tensors.

        Raises:
            InputError: Something is unknown, no text in UTF-8 or out of its range, or there is not one prompt.
        """
        _refuse_unknown(parameters)
        values = {name: _value(name, array) for name, array in tensors.items()}
        return cls(_prompt(values), _options(values), values.get("stream", False))

    def tokens(self, session: Session) -> tuple[int, ...]:
        """Return the tokens of the prompt.

        Raises:
            InputError: The bundle has no chat template, or it refuses the messages.
        """
        if isinstance(self.prompt, str):
            return tuple(session.text_codec.encode(self.prompt))
        return tuple(session.chat_tokens(self.prompt))


def _refuse_unknown(parameters: Iterable[str]) -> None:
    # Triton passes a field of the body on as a parameter if no input has its name.
    for name in sorted(parameters):
        if name != "id" and not name.startswith(_OF_TRITON):
            raise InputError("there is no such field", where=name, fix=f"give some of {', '.join(_NAMES)}")


def _options(values: Mapping[str, Any]) -> GenerationOptions:
    options = {ours: values[name] for name, ours in _OPTIONS.items() if name in values}
    try:
        return GenerationOptions(**options)
    except InputError as error:
        theirs = {ours: name for name, ours in _OPTIONS.items()}
        raise InputError(error.what, where=theirs.get(error.where or ""), fix=error.fix) from error


def _value(name: str, array: np.ndarray) -> Any:
    items = [_item(name, item) for item in array.reshape(-1)]
    if name in _MANY:
        return tuple(items)
    if len(items) != 1:
        raise InputError(f"{len(items)} values instead of one", where=name, fix="give one value")
    return items[0]


def _item(name: str, item: Any) -> Any:
    if isinstance(item, bytes):
        try:
            return item.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 ({error.reason})", where=name, fix="encode it as UTF-8") from error
    if isinstance(item, np.float32):
        return float(str(item))  # the decimal number that was sent, which a float64 holds more of
    return item.item() if isinstance(item, np.generic) else item


def _prompt(values: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    if ("text_input" in values) == ("messages" in values):
        raise InputError(
            "exactly one prompt is needed", where="text_input", fix="give either text_input or messages"
        )
    if "text_input" in values:
        return str(values["text_input"])
    found = parse_json(values["messages"].encode(), where="messages", fix="give a list of messages as JSON")
    if not (isinstance(found, list) and found and all(isinstance(message, dict) for message in found)):
        raise InputError("no list of messages", where="messages", fix="give a JSON list of objects")
    return found
