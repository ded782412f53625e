"""What a request to Triton asks for, and how the served bundle is configured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_models import TinyDecoder

from rk_export.errors import InputError
from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine.records import EngineOptions
from rk_export.runtime.providers import SessionSettings
from rk_export.runtime.triton.ask import Ask
from rk_export.runtime.triton.settings import ServedSettings


def texts(*items: str | bytes) -> np.ndarray:
    return np.array([item.encode() if isinstance(item, str) else item for item in items], object)


def test_every_tensor_reaches_its_option() -> None:
    ask = Ask.read(
        {
            "text_input": texts("Grüße"),
            "max_tokens": np.array([5], np.int32),
            "temperature": np.array([0.7], np.float32),
            "top_p": np.array([0.9], np.float32),
            "top_k": np.array([40], np.int32),
            "seed": np.array([2**40], np.int64),
            "stop": texts("a", "b"),
            "stream": np.array([True]),
        }
    )
    assert ask.prompt == "Grüße"
    assert ask.stream is True
    assert ask.options == GenerationOptions(
        max_new_tokens=5, temperature=0.7, top_p=0.9, top_k=40, seed=2**40, stop=("a", "b")
    )


def test_what_is_absent_keeps_its_default() -> None:
    ask = Ask.read({"text_input": texts("a")}, ["id", "triton_enable_empty_final_response"])
    assert ask == Ask("a", GenerationOptions(), stream=False)


def test_messages_become_the_tokens_of_the_chat_template(tmp_path: Path) -> None:
    session = Session.from_pretrained(TinyDecoder().write(tmp_path), provider="cpu", threads=1)
    ask = Ask.read({"messages": texts('[{"role": "user", "content": "hi"}]')})
    assert ask.tokens(session) == tuple(session.chat_tokens([{"role": "user", "content": "hi"}]))
    text = Ask.read({"text_input": texts("hi")})
    assert text.tokens(session) == tuple(session.text_codec.encode("hi"))


@pytest.mark.parametrize(
    ("tensors", "parameters", "message"),
    [
        ({}, [], "text_input: exactly one prompt is needed"),
        ({"text_input": texts("a"), "messages": texts("[]")}, [], "text_input: exactly one prompt is needed"),
        ({"text_input": texts("a")}, ["max_tokenz"], "max_tokenz: there is no such field"),
        ({"text_input": texts(b"\xff")}, [], "text_input: not UTF-8"),
        ({"text_input": texts("a", "b")}, [], "text_input: 2 values instead of one"),
        (
            {"text_input": texts("a"), "max_tokens": np.array([0], np.int32)},
            [],
            "max_tokens: 0 is out of range",
        ),
        (
            {"text_input": texts("a"), "top_p": np.array([np.nan], np.float32)},
            [],
            "top_p: nan is out of range",
        ),
        ({"text_input": texts("a"), "stop": texts("")}, [], "stop: .* is out of range"),
        ({"messages": texts("[{")}, [], "messages: not valid JSON"),
        ({"messages": texts("[]")}, [], "messages: no list of messages"),
        ({"messages": texts('["hi"]')}, [], "messages: no list of messages"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_the_clients_name(
    tensors: dict[str, np.ndarray], parameters: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Ask.read(tensors, parameters)


def strings(**values: str) -> dict[str, Any]:
    return {name: {"string_value": value} for name, value in values.items()}


def test_parameters_of_the_configuration_reach_session_and_engine() -> None:
    given = strings(
        provider="cpu", threads="2", max_length="64", slots="3", queue="0", EXECUTION_ENV_PATH="x"
    )
    assert ServedSettings.read(given) == ServedSettings(
        SessionSettings("cpu", 2), 64, EngineOptions(slots=3, queue=0)
    )
    assert ServedSettings.read({}) == ServedSettings(SessionSettings(), None, EngineOptions())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (strings(slotz="3"), "slotz: there is no such parameter"),
        (strings(slots="many"), "slots: 'many' is no whole number"),
        (strings(slots="0"), "slots: 0 is out of range"),
        (strings(provider="tpu"), "provider: 'tpu' is unknown"),
    ],
)
def test_parameters_that_cannot_be_used_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        ServedSettings.read(values)
