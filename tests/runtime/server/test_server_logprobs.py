"""Log probabilities: where tokens begin in the text, and what a tokenizer that cannot be read costs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import serving, streamed, write_decoder

from rk_export.errors import InputError
from rk_export.runtime import Session
from rk_export.runtime.engine import Answer, Piece, Request, TokenScore
from rk_export.runtime.options import FinishReason
from rk_export.runtime.server import opened
from rk_export.runtime.server.json_schema import GrammarTokens
from rk_export.runtime.server.logprobs import Offsets, chat_logprobs, completion_logprobs

# Characters of one to four bytes, a byte that belongs to none, and a special token in between.
TEXT = [*"aé▓b".encode(), 0xFE, 256, *"🐟c".encode()]
READ = bytes(token for token in TEXT if token < 256)
# Characters that are whole before each token; the broken byte is one.
BEGINS = [0, 1, 1, 2, 2, 2, 3, 4, 5, 5, 5, 5, 5, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def decoder(folder: Path) -> opened.Decoder:
    session = Session.from_pretrained(folder, provider="cpu", threads=1)
    return opened.Decoder(session, None, 96)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, len(TEXT)])
def test_offsets_count_the_characters_of_the_text(decoder: opened.Decoder, size: int) -> None:
    text = decoder.session.text_codec.decode(TEXT)
    assert text == READ.decode("utf-8", "replace") == "aé▓b\ufffd🐟c"
    offsets, found = Offsets(7), []
    for begin in range(0, len(TEXT), size):
        scores = [TokenScore(token, -1.0) for token in TEXT[begin : begin + size]]
        found += completion_logprobs(decoder, scores, offsets)["text_offset"]
    assert found == [7 + begin for begin in BEGINS]


class Scripted:
    """An engine whose pieces bring scores before their text, as those before a stop string do."""

    slots = 1

    def submit(self, request: Request, listener: Callable[[Any], None]) -> Scripted:
        scores = tuple(TokenScore(token, -1.0) for token in TEXT)
        for token, score in zip(TEXT, scores, strict=True):
            listener(Piece("", (token,), (score,)))
        text = READ.decode("utf-8", "replace")
        listener(Piece(text, ()))
        listener(Answer(text, tuple(TEXT), FinishReason.EOS, len(request.prompt), scores=scores))
        return self

    def cancel(self) -> None:
        pass


def test_a_stream_has_the_offsets_of_the_whole(folder: Path) -> None:
    with serving({"tiny": folder}) as server:
        engine = server.decoder().engine
        object.__setattr__(server.decoder(), "engine", Scripted())
        body = {"model": "tiny", "prompt": "x", "logprobs": 0}
        whole = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]["text_offset"]
        stream = streamed(server.post("/v1/completions", {**body, "stream": True}).iter_lines())
        object.__setattr__(server.decoder(), "engine", engine)
    parts = [choice["logprobs"]["text_offset"] for chunk in stream.chunks for choice in chunk["choices"]]
    assert whole == [offset for part in parts for offset in part] == BEGINS


def test_a_tokenizer_that_cannot_be_read_is_tried_once(
    decoder: opened.Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def broken(*_: Any) -> GrammarTokens:
        tries.append(1)
        raise InputError("no grammar can be kept", fix="ask for plain text")

    monkeypatch.setattr(opened, "GrammarTokens", broken)
    scores = [TokenScore(token, -1.0, tuple((other, -2.0) for other in b"xyz")) for token in b"abc"]
    found = chat_logprobs(decoder, scores)["content"]
    assert [entry["bytes"] for entry in found] == [[97], [98], [99]]
    for _ in range(2):
        with pytest.raises(InputError, match="no grammar can be kept") as refusal:
            _ = decoder.grammar
        assert len(refusal.traceback) == 2
    assert tries == [1]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", {"prompt": "x", "logprobs": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True}),
    ],
)
def test_the_tokenizer_is_read_beside_the_event_loop(
    folder: Path, monkeypatch: pytest.MonkeyPatch, route: str, body: dict[str, Any]
) -> None:
    on_loop = []

    def read(*given: Any) -> GrammarTokens:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            on_loop.append(False)
        else:
            on_loop.append(True)
        return GrammarTokens(*given)

    monkeypatch.setattr(opened, "GrammarTokens", read)
    with serving({"tiny": folder}) as server:
        answer = server.post(route, {"model": "tiny", "max_tokens": 2, **body})
    assert answer.status_code == 200
    assert on_loop == [False]
