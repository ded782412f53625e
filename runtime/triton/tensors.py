"""The tensors that a request to Triton may bring, and those of its answer: the one list, for config.pbtxt too."""

from __future__ import annotations

from dataclasses import dataclass

BUNDLE_FOLDER = "bundle"  # beside model.py


@dataclass(frozen=True)
class TextTensor:
    """One input or output of the served model.

    Args:
        name: Its name; over HTTP, the field of the JSON body.
        type: As config.pbtxt writes it.
        many: Whether it holds any number of values instead of one.
    """

    name: str
    type: str
    many: bool = False


# Each may be absent, so that a body of /generate names only what it wants.
INPUTS = (
    TextTensor("text_input", "TYPE_STRING"),
    TextTensor("messages", "TYPE_STRING"),
    TextTensor("max_tokens", "TYPE_INT32"),
    TextTensor("temperature", "TYPE_FP32"),
    TextTensor("top_p", "TYPE_FP32"),
    TextTensor("top_k", "TYPE_INT32"),
    TextTensor("seed", "TYPE_INT64"),
    TextTensor("stop", "TYPE_STRING", many=True),
    TextTensor("stream", "TYPE_BOOL"),
)
OUTPUTS = (
    TextTensor("text_output", "TYPE_STRING"),
    TextTensor("finish_reason", "TYPE_STRING"),
    TextTensor("prompt_tokens", "TYPE_INT32"),
    TextTensor("completion_tokens", "TYPE_INT32"),
)
