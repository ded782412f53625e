"""Bundles behind Ray Serve: answers by name, a replica that is killed, clients that leave, growth, an orderly end.

Runs in an environment of its own (``make test-ray-serve``): Ray is large.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason="needs Ray Serve: run `make test-ray-serve`")
pytest.importorskip("openai")

import httpx
import openai
from ray import serve
from ray_serve_clients import Crowd, Told, ask, client
from ray_serve_here import GROWING, ROOT, TWO, WAITING, Application, replicas, started, wait_until, written

from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine import Counters

PROMPTS = ["harbour", "salt and dough", "9:15", "Tuesday", "a mast", "gulls", "the budget", "morning"]
LONG = 600  # tokens: an answer during which a replica can be killed
LONGEST = 4000  # an answer that takes seconds
ROUNDS = 6  # at most; usually the first brings what the test waits for


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with started(written(tmp_path_factory.mktemp("bundles"))) as running:
        yield running


@pytest.fixture(scope="module")
def sessions(application: Application) -> dict[str, Session]:
    """The same bundles in this process, which says what is right."""
    return {name: Session.from_pretrained(path, threads=1) for name, path in application.bundles.items()}


@pytest.fixture(scope="module")
def right(sessions: dict[str, Session]) -> dict[str, dict[str, str]]:
    """Of each model and prompt, the long greedy answer."""
    options = GenerationOptions(max_new_tokens=LONG)
    return {
        name: {prompt: session.generate(prompt, options=options)[0].text for prompt in PROMPTS}
        for name, session in sessions.items()
    }


def test_each_name_answers_as_its_bundle(application: Application, right: dict[str, dict[str, str]]) -> None:
    assert right[TWO] != right[GROWING]
    assert len(set(right[TWO].values())) == len(PROMPTS)
    for name, texts in right.items():
        for stream in (False, True):
            told = Told(PROMPTS[0], stream)
            ask(application.url, name, told, tokens=LONG)
            assert (told.text, told.error, told.attempts) == (texts[PROMPTS[0]], None, 1)
    listed = client(application.url).models.list()
    assert {model.id for model in listed} == {TWO, GROWING}


def test_a_chat_streamed_and_not(application: Application, sessions: dict[str, Session]) -> None:
    messages = [{"role": "user", "content": "Where is the gull?"}]
    expected = sessions[TWO].chat(messages, GenerationOptions(max_new_tokens=24))
    chats = client(application.url).chat.completions
    whole = chats.create(model=TWO, messages=messages, max_tokens=24, temperature=0)  # type: ignore[arg-type]
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (expected.prompt_tokens, 24)
    usage = {"include_usage": True}
    stream = chats.create(  # type: ignore[call-overload]
        model=TWO, messages=messages, max_tokens=24, temperature=0, stream=True, stream_options=usage
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == 24


def test_refusals_name_the_field_and_no_path(application: Application) -> None:
    body = {"model": TWO, "prompt": "salt"}
    cases = [
        ({**body, "model": "three"}, 404, "model_not_found"),
        ({**body, "temperature": -1}, 400, "temperature"),
        ({**body, "logit_bias": {"1": 5}}, 400, "logit_bias"),
        ({**body, "prompt": "x" * 5000}, 400, "context_length_exceeded"),
        ({**body, "prompt": "x" * 5000, "stream": True}, 400, "context_length_exceeded"),
        ("no object", 400, "no JSON object"),
    ]
    for sent, status, word in cases:
        response = httpx.post(f"{application.url}/v1/completions", json=sent, timeout=60)
        assert response.status_code == status
        assert word in response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert str(application.bundles[TWO].parent) not in response.text
    assert httpx.post(f"{application.url}/v1/completions", content="{", timeout=60).status_code == 400
    assert httpx.get(f"{application.url}/v1/other", timeout=60).status_code == 404


def test_a_killed_replica_loses_only_answers_that_had_begun(
    application: Application, right: dict[str, dict[str, str]]
) -> None:
    crowd, lost, repeated = Crowd(application.url, TWO, LONG), [], []
    for _ in range(ROUNDS):
        wait_until(lambda: len(replicas(TWO)) == 2)
        with crowd.asking(PROMPTS) as told:
            wait_until(lambda told=told: all(one.text or one.done for one in told if one.stream))
            begun = {one.prompt: len(one.text) for one in told if one.stream and not one.done}
            os.kill(replicas(TWO)[0], signal.SIGKILL)
        for one in told:
            if one.error is None:
                assert one.text == right[TWO][one.prompt]
            else:
                assert one.prompt in begun
                assert right[TWO][one.prompt].startswith(one.text)
                assert begun[one.prompt] <= len(one.text) < len(right[TWO][one.prompt])
                assert one.error.code == "replica_lost"
                assert "send the request again" in one.error.message
        lost += [one for one in told if one.error is not None]
        repeated += [one for one in told if one.attempts > 1 and one.error is None]
        if lost and repeated:
            break
    assert lost
    assert repeated
    seconds = wait_until(lambda: len(replicas(TWO)) == 2)
    print(
        f"\n{len(crowd.told)} asked, {len(lost)} broken off, {len(repeated)} repeated; whole after {seconds:.1f} s"
    )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(application: Application, stream: bool) -> None:
    replica = serve.get_deployment_handle(f"model-{GROWING}", "default")

    def counters() -> Counters:
        return replica.counters.remote().result(timeout_s=30)  # type: ignore[no-any-return]

    before = counters()
    url, body = (
        f"{application.url}/v1/completions",
        {"model": GROWING, "prompt": "gulls", "max_tokens": LONGEST},
    )
    if stream:
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
            texts = response.iter_text()
            next(texts)
            assert counters().running == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.5)
    seconds = wait_until(lambda: counters().running == 0)
    assert counters().requests == before.requests + 1
    assert counters().finished["cancelled"] == before.finished.get("cancelled", 0) + 1
    print(f"\nstream {stream}: free after {seconds:.2f} s")


def test_load_adds_a_replica_and_changes_no_answer(
    application: Application, right: dict[str, dict[str, str]]
) -> None:
    crowd = Crowd(application.url, GROWING, LONG)
    begin = time.monotonic()
    while len(replicas(GROWING)) == 1:
        assert time.monotonic() - begin < 90
        with crowd.asking(PROMPTS) as told:
            pass
        assert not [one.error for one in told if one.error is not None]
    print(f"\na second replica after {time.monotonic() - begin:.1f} s and {len(crowd.told)} answers")
    with crowd.asking(PROMPTS):
        pass
    for one in crowd.told:
        assert (one.text, one.error) == (right[GROWING][one.prompt], None)


def test_more_than_may_wait_are_refused_and_the_others_answered(
    application: Application, right: dict[str, dict[str, str]]
) -> None:
    crowd = Crowd(application.url, GROWING, LONG)
    with crowd.asking(PROMPTS * 10):
        pass
    refused = [one for one in crowd.told if one.error is not None]
    assert 0 < len(refused) <= len(crowd.told) - WAITING
    for one in refused:
        assert isinstance(one.error, openai.RateLimitError)
        assert (one.error.code, one.error.response.headers["retry-after"]) == ("queue_full", "1")
    for one in crowd.told:
        assert one in refused or one.text == right[GROWING][one.prompt]


def test_an_application_that_is_replaced_finishes_its_answers(
    application: Application, right: dict[str, dict[str, str]]
) -> None:
    """The command line of the sample, too: it takes the place of what ran before."""
    long = GenerationOptions(max_new_tokens=LONGEST)
    name, folder = "other", str(application.bundles[TWO])
    expected = Session.from_pretrained(folder, threads=1).generate("gulls", options=long)[0].text
    told = Told("gulls", stream=True)
    running = threading.Thread(target=ask, args=(application.url, TWO, told), kwargs={"tokens": LONGEST})
    running.start()
    wait_until(lambda: bool(told.text) or told.done)
    before = replicas(TWO)
    command = [
        Path(sys.executable).with_name("serve"),
        "run",
        "ray_serve.app:application",
        f"{name}={folder}",
    ]
    with subprocess.Popen([*command, "--address", application.address], cwd=ROOT / "samples") as process:
        try:
            wait_until(lambda: len(replicas(name)) == 1)
            assert not told.done  # the old replicas end behind their last answer
            running.join()
            assert (told.text, told.error) == (expected, None)
            wait_until(lambda: not set(before) & set(replicas(TWO)))
            new = Told(PROMPTS[0], stream=False)
            ask(application.url, name, new, tokens=LONG)
            assert (new.text, new.error) == (right[TWO][PROMPTS[0]], None)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
    wait_until(lambda: not replicas(name))
    with pytest.raises(openai.APIConnectionError):
        client(application.url).models.list()
