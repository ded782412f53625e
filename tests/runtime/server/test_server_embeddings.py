"""`/v1/embeddings` over HTTP, against the encoder's own vectors."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from encoder_bundles import write_classifier, write_embedding_model
from runtime_models import write_encoder
from serving import Running, checked, error_of, serving, write_decoder

from rk_export.errors import InputError
from rk_export.runtime import Encoder, EncoderSession
from rk_export.runtime.server import embeddings
from rk_export.runtime.server.models import Models
from rk_export.runtime.server.settings import ServerSettings

TEXTS = ["harbour", "a", "ship at sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("bundles") / "enc")


@pytest.fixture(scope="module")
def server(folder: Path, prompted: Path) -> Iterator[Running]:
    decoder = write_decoder(folder.parent / "tiny")
    with serving({"enc": folder, "prompted": prompted, "tiny": decoder}) as running:
        yield running


@pytest.fixture(scope="module")
def prompted(folder: Path) -> Path:
    prompts = {"query": "q: ", "passage": "p: "}
    return write_embedding_model(
        folder.parent / "prompted", normalizes=False, prompts=prompts, default_prompt_name="passage"
    )


@pytest.fixture(scope="module")
def session(folder: Path) -> EncoderSession:
    return EncoderSession.from_pretrained(folder, provider="cpu", threads=1)


def test_vectors_are_the_encoders(server: Running, session: EncoderSession) -> None:
    expected = session.embed(TEXTS)
    for form in ("float", "base64"):  # the client decodes the second one itself
        found = server.client().embeddings.create(model="enc", input=TEXTS, encoding_format=form)
        vectors = [item.embedding for item in found.data]
        if form == "base64":
            vectors = [np.frombuffer(base64.b64decode(str(vector)), "<f4") for vector in vectors]
        np.testing.assert_allclose(np.array(vectors, np.float32), expected, rtol=0, atol=0)
    usual = server.client().embeddings.create(model="enc", input=TEXTS)
    np.testing.assert_array_equal(np.array([item.embedding for item in usual.data], np.float32), expected)
    assert usual.usage.prompt_tokens == sum(len(session.text_codec.encode(text)) for text in TEXTS)


def test_the_models_own_vectors_behind_their_prompts(server: Running, prompted: Path) -> None:
    encoder = Encoder(prompted, provider="cpu", threads=1)
    for more in ({}, {"prompt_name": "query"}, {"prompt_name": "passage"}):
        found = server.post("/v1/embeddings", {"model": "prompted", "input": TEXTS, **more}).json()["data"]
        expected = encoder.encode(TEXTS, normalize=True, **more)
        np.testing.assert_allclose([item["embedding"] for item in found], expected, atol=1e-6)
    body = {"model": "prompted", "input": TEXTS, "prompt_name": "title"}
    answer = server.post("/v1/embeddings", body)
    assert answer.status_code == 400
    assert "nown are: query, passage" in answer.text


def test_a_classifier_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a classifier"):
        Models({"class": write_classifier(tmp_path)}, ServerSettings())


def test_tokens_are_texts_too(server: Running, session: EncoderSession) -> None:
    tokens = [session.text_codec.encode(text) for text in TEXTS]
    found = [
        checked(server.post("/v1/embeddings", {"model": "enc", "input": given}).json())["data"]
        for given in (TEXTS, tokens, TEXTS[0], tokens[0])
    ]
    assert found[0] == found[1]
    assert found[2] == found[3]


def test_many_texts_are_several_batches(server: Running, session: EncoderSession) -> None:
    texts = [f"text {number}" for number in range(40)]
    found = server.post("/v1/embeddings", {"model": "enc", "input": texts}).json()["data"]
    expected = np.concatenate([session.embed([text]) for text in texts])
    np.testing.assert_allclose([item["embedding"] for item in found], expected, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        {"input": []},
        {"input": [""] * 3000},
        {"input": "far too long for sixteen positions"},
        {"input": [[]]},
        {"input": [999]},
        {"input": [[-1]]},
        {"input": [[10**30]]},
        {"input": 5},
        {"dimensions": 3},
        {"encoding_format": "hex"},
        {"model": "tiny"},
        {"truncate": True},
    ],
)
def test_what_cannot_be_done_is_refused(server: Running, more: dict[str, object]) -> None:
    answer = server.post("/v1/embeddings", {"model": "enc", "input": "a", **more})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["type"] == "invalid_request_error"


def test_an_encoder_continues_no_text(server: Running) -> None:
    for path, more in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        answer = server.post(path, {"model": "enc", **more})
        assert (answer.status_code, error_of(answer)["code"]) == (400, "wrong_model_kind")


def test_its_own_dimensions_may_be_named(server: Running) -> None:
    answer = server.post("/v1/embeddings", {"model": "enc", "input": "a", "dimensions": 8})
    assert len(answer.json()["data"][0]["embedding"]) == 8


def test_many_vectors_hold_up_no_probe(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, before = set(), embeddings._entry

    def noted(*given: Any) -> dict[str, Any]:
        threads.add(threading.current_thread())
        return before(*given)

    monkeypatch.setattr(embeddings, "_entry", noted)
    assert server.post("/v1/embeddings", {"model": "enc", "input": TEXTS}).status_code == 200
    assert threads
    assert server.server_thread not in threads


def test_what_the_encoder_would_cut_is_refused(tmp_path: Path) -> None:
    short = write_encoder(tmp_path / "short")
    (short / "sentence_bert_config.json").write_text('{"max_seq_length": 4}', encoding="utf-8")
    session = EncoderSession.from_pretrained(short, provider="cpu", threads=1)
    assert session.longest == 4
    with pytest.raises(InputError, match=r"text 1 has 5 tokens\nFix: give 1 to 4"):
        session.embed(["abc", "abcd"])
    with serving({"short": short}) as server:
        found = server.client().embeddings.create(model="short", input=["abc"])
        np.testing.assert_array_equal(
            np.array(found.data[0].embedding, np.float32), session.embed(["abc"])[0]
        )
        with pytest.raises(openai.BadRequestError, match="input 1 has 5 tokens; give 1 to 4"):
            server.client().embeddings.create(model="short", input=["abc", "abcd"])


def test_a_model_without_a_limit_refuses_only_what_has_no_tokens(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    session = EncoderSession.from_pretrained(folder, provider="cpu", threads=1)
    assert session.longest is None
    assert (session.refusal([]), session.refusal([1] * 999)) == ("give 1 or more", None)
