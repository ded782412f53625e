"""A bundle in the real tritonserver, against `Session` on the same bundle.

Runs in an environment of its own (``make test-triton``), since the server's package needs numpy below 2.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytriton", reason="needs nvidia-pytriton: run `make test-triton`")

from runtime_models import TinyDecoder
from served import Answer, Served
from triton_server import TritonServer
from tritonclient.utils import InferenceServerException

from rk_export import deployment_files
from rk_export.manifest import write_manifest
from rk_export.runtime import GenerationOptions, Session

PROMPTS = ["hello", "The harbour was quiet", "a", "9:15 and 10:45", "Grüße aus Köln", "dough " * 8]
NEW_TOKENS = 24
LONG = 500_000  # tokens, which take minutes
FREED_WITHIN = 15  # seconds
REFUSED = 400  # the status of tritonserver 2.51 for every error of a model, whatever its kind


def made_bundle(folder: Path, **form: Any) -> Path:
    TinyDecoder(external=True, quantized_head=True, **form).write(folder)
    write_manifest(folder, {"ep": "cpu", "shared_kv_cache": True})
    return folder


def endless_bundle(folder: Path) -> Path:
    """Make a bundle whose answers end at the asked number of tokens only."""
    TinyDecoder(context=2 * LONG).write(folder, eos=[])
    (folder / "tokenizer_config.json").write_text("{}")
    write_manifest(folder, {"ep": "cpu", "shared_kv_cache": True})
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server with two models: `tiny`, and `endless` with two slots and no queue."""
    (repository,) = deployment_files(bundle, ["triton-python"])
    other = endless_bundle(tmp_path_factory.mktemp("other") / "endless")
    (narrow,) = deployment_files(other, ["triton-python"])
    config = narrow / "endless" / "config.pbtxt"
    text = config.read_text().replace('string_value: "8"', 'string_value: "2"')
    config.write_text(text.replace('"queue" value { string_value: "64"', '"queue" value { string_value: "0"'))
    (narrow / "endless").rename(repository / "endless")
    server = TritonServer(repository, tmp_path_factory.mktemp("server"))
    try:
        server.wait()
        yield server
        assert server.stop() == 0
        assert not server.members()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return Session.from_pretrained(bundle, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def tiny(server: TritonServer) -> Served:
    return Served(server, "tiny")


@pytest.fixture(scope="module")
def endless(server: TritonServer) -> Served:
    return Served(server, "endless")


def text_of(events: list[Answer]) -> str:
    assert [set(event) & {"finish_reason"} for event in events[:-1]] == [set()] * (len(events) - 1)
    assert events[-1]["finish_reason"]
    return "".join(event["text_output"] for event in events)


def by_generate(served: Served, prompt: str) -> str:
    status, answer = served.generate(text_input=prompt, max_tokens=NEW_TOKENS)
    assert status == 200
    return str(answer["text_output"])


def by_sse(served: Served, prompt: str) -> str:
    events = served.stream(text_input=prompt, max_tokens=NEW_TOKENS)
    assert len(events) > 2
    return text_of(events)


def by_grpc(served: Served, prompt: str) -> str:
    responses = served.grpc(text_input=prompt, max_tokens=NEW_TOKENS, stream=True)
    assert len(responses) > 2
    return text_of(responses)


WAYS = [by_generate, by_sse, by_grpc]


def greedy(session: Session, prompt: str) -> str:
    return session.generate(prompt, options=GenerationOptions(max_new_tokens=NEW_TOKENS))[0].text


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_is_that_of_the_session(way: Callable[..., str], tiny: Served, session: Session) -> None:
    assert [way(tiny, prompt) for prompt in PROMPTS] == [greedy(session, prompt) for prompt in PROMPTS]


def test_six_requests_at_once_get_each_their_own_answer(tiny: Served, session: Session) -> None:
    ways = [WAYS[index % 3] for index in range(len(PROMPTS))]
    expected = [greedy(session, prompt) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS) == 6
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for _ in range(5):
            answers = pool.map(lambda way, prompt: way(tiny, prompt), ways, PROMPTS)
            assert list(answers) == expected


def test_an_answer_says_how_it_ended(tiny: Served, session: Session) -> None:
    expected = session.generate("hello", options=GenerationOptions(max_new_tokens=NEW_TOKENS))[0]
    _, answer = tiny.generate(text_input="hello", max_tokens=NEW_TOKENS)
    assert answer["finish_reason"] == expected.finish_reason
    assert answer["prompt_tokens"] == expected.prompt_tokens
    assert answer["completion_tokens"] == len(expected.token_ids)
    assert tiny.grpc(text_input="hello", max_tokens=NEW_TOKENS) == [
        {
            name: answer[name]
            for name in ("text_output", "finish_reason", "prompt_tokens", "completion_tokens")
        }
    ]


def test_sampling_and_stops_are_those_of_the_session(tiny: Served, session: Session) -> None:
    options = GenerationOptions(max_new_tokens=40, temperature=0.7, top_p=0.9, top_k=50, seed=7)
    drawn = session.generate("hello", options=options)[0].text
    body: dict[str, Any] = {
        "text_input": "hello",
        **{"max_tokens": 40, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": 7},
    }
    assert tiny.generate(**body)[1]["text_output"] == drawn
    assert drawn != session.generate("hello", options=GenerationOptions(max_new_tokens=40))[0].text
    stop = drawn[5:7]
    stopped = tiny.generate(**body, stop=["never there", stop])[1]
    assert stopped["text_output"] == drawn[: drawn.index(stop)]
    assert stopped["finish_reason"] == "stop"
    nested = {"text_input": "hello", "parameters": {**body, "stop": stop}}
    nested["parameters"].pop("text_input")
    assert tiny.generate(**nested)[1] == stopped


def test_messages_go_through_the_chat_template(tiny: Served, session: Session) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is Köln?"}]
    expected = session.chat(messages, GenerationOptions(max_new_tokens=NEW_TOKENS))
    status, answer = tiny.generate(messages=json.dumps(messages), max_tokens=NEW_TOKENS)
    assert (status, answer["text_output"]) == (200, expected.text)
    assert answer["prompt_tokens"] == expected.prompt_tokens


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text_input": "a", "max_tokenz": 3}, "max_tokenz: there is no such field"),
        ({"text_input": "a", "parameters": {"best_of": 3}}, "best_of: there is no such field"),
        ({"text_input": "a" * 200}, "leave no room in a context of 96"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens: 0 is out of range"),
        ({"text_input": "a", "temperature": -1}, "temperature: -1.0 is out of range"),
        ({}, "exactly one prompt is needed"),
        ({"messages": "[{"}, "messages: not valid JSON"),
        ({"messages": '[{"role": "tool", "content": "a"}]'}, "the template refuses the messages: no tools"),
    ],
)
def test_a_request_that_cannot_be_answered_says_why(body: Answer, message: str, tiny: Served) -> None:
    status, answer = tiny.generate(**body)
    assert status == REFUSED
    assert message in answer["error"]
    assert "/" not in answer["error"]
    assert tiny.stream(**body) == [{"error": answer["error"]}]
    assert tiny.generate(text_input="a", max_tokens=1)[0] == 200


def test_errors_reach_grpc_too(tiny: Served) -> None:
    with pytest.raises(InferenceServerException, match="leave no room in a context of 96"):
        tiny.grpc(text_input="a" * 200, stream=True)


def test_a_request_joins_a_running_one_and_is_refused_where_all_slots_are_taken(endless: Served) -> None:
    with endless.grpc_stream(text_input="a", max_tokens=LONG, stream=True) as first:
        next(first)
        assert endless.generate(text_input="b", max_tokens=2)[0] == 200
        with endless.grpc_stream(text_input="c", max_tokens=LONG, stream=True) as second:
            next(second)
            status, answer = endless.generate(text_input="d", max_tokens=2)
            assert status == REFUSED
            assert "try again later" in answer["error"]
    wait_until_both_are_free(endless)


def wait_until_both_are_free(endless: Served) -> None:
    """Return as soon as both slots take requests; the long answers would hold them for minutes."""
    end = time.monotonic() + FREED_WITHIN
    with ThreadPoolExecutor(2) as pool:
        while time.monotonic() < end:
            answers = pool.map(lambda text: endless.generate(text_input=text, max_tokens=2000)[0], "ab")
            if list(answers) == [200, 200]:
                return
            time.sleep(0.1)
    pytest.fail("a slot was not freed")


def test_a_client_that_leaves_frees_its_slot(endless: Served) -> None:
    """With /generate the server itself would notice nothing until the answer is whole."""
    body = {"max_tokens": LONG, "stream": True}
    with (
        endless.http_connection("generate_stream", text_input="a", **body) as one,
        endless.http_connection("generate_stream", text_input="b", **body) as two,
    ):
        for connection in (one, two):
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert "try again later" in endless.generate(text_input="c", max_tokens=2)[1]["error"]
    wait_until_both_are_free(endless)


def test_a_running_answer_is_finished_before_the_server_ends(tmp_path: Path) -> None:
    (repository,) = deployment_files(endless_bundle(tmp_path / "endless"), ["triton-python"])
    (tmp_path / "server").mkdir()
    server = TritonServer(repository, tmp_path / "server")
    try:
        server.wait()
        served, codes = Served(server, "endless"), []
        ending = threading.Thread(target=lambda: codes.append(server.stop()))
        with served.grpc_stream(text_input="a", max_tokens=2000, stream=True) as responses:
            first = next(responses)
            ending.start()
            events = [first, *responses]
        ending.join()
        assert events[-1]["completion_tokens"] == 2000
        assert codes == [0]
        assert not server.members()
    finally:
        server.kill()
