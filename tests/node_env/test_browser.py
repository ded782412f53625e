"""Pages in a headless browser: a bundle that runs in the page, and the chat page of the server.

Runs with ``make test-browser``: the packages of ``package.json`` and a Chromium of the system, named by RK_BROWSER.
RK_PICTURES may name a folder for pictures of the chat page.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

if not {"RK_NODE_MODULES", "RK_BROWSER"} <= os.environ.keys():
    pytest.skip("needs a browser and packages of Node.js: run `make test-browser`", allow_module_level=True)

from conftest import VOCABULARY, tiny_options, trained_tokenizer
from node_scripts import node
from page_servers import FENCED, KEY, MODELS, address, fake_chat, files, listening
from tiny_models import tiny_model

from rk_export import Run, compress, deployment_files
from rk_export.cli.parser import build_parser
from rk_export.runtime import GenerationOptions, Session

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "runtime" / "server" / "static" / "index.html"


# A bundle in the browser


@pytest.fixture(scope="module")
def bundle(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that computes in floats: WebAssembly rounds 8-bit activations otherwise."""
    folder = tmp_path_factory.mktemp("browser") / "bundle"
    compress(llama, folder, tiny_options(accuracy_level=0), run=Run(threads=1))
    deployment_files(folder, ["transformers.js"])
    return folder


@pytest.fixture(scope="module")
def long_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for an answer that can be stopped before it is complete."""
    place = tmp_path_factory.mktemp("long")
    model = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=4096)
    rows = model.lm_head.weight.data
    rows[model.config.eos_token_id] = rows[100] / 2  # the likeliest token has a score above 0: never this one
    model.save_pretrained(place / "model")
    trained_tokenizer().save_pretrained(place / "model")
    compress(place / "model", place / "bundle", tiny_options(accuracy_level=0), run=Run(threads=1))
    deployment_files(place / "bundle", ["transformers.js"])
    return place / "bundle"


@contextmanager
def sample(bundle: Path) -> Iterator[str]:
    """Serve the sample page, the packages and a bundle; yields the address of the page."""
    folders = {
        "page": ROOT / "samples" / "browser",
        "bundle": bundle,
        "lib": Path(os.environ["RK_NODE_MODULES"]),
    }
    with listening(files(folders)) as server:
        yield f"{address(server)}/page/index.html"


@pytest.mark.whole
def test_a_bundle_answers_in_the_browser(bundle: Path) -> None:
    with sample(bundle) as page:
        query = "?model=/bundle/transformers.js&library=/lib"
        found = node("model_page.mjs", url=page + query, prompt="Hi there")
        assert found["hosts"] == [page.split("/")[2]]
    opened = Session.from_pretrained(bundle, provider="cpu", threads=1)
    message = {"role": "user", "content": "Hi there"}
    room = 128 - len(opened.chat_tokens([message]))  # the positions of the tiny model
    expected = opened.chat([message], GenerationOptions(max_new_tokens=room))
    assert found["answer"] == expected.text
    assert found["state"].startswith(f"{len(expected.token_ids)} tokens, ")
    assert found["complaints"] == []


@pytest.mark.whole
def test_an_answer_in_the_browser_is_stopped(long_bundle: Path) -> None:
    with sample(long_bundle) as page:
        query = "?model=/bundle/transformers.js&library=/lib"
        found = node("model_page.mjs", url=page + query, prompt="Hi", stop=True)
    assert 0 < int(found["state"].split()[0]) < 128  # which are asked for


@pytest.mark.whole
def test_the_page_says_what_does_not_work(bundle: Path) -> None:
    with sample(bundle) as page:
        model = "?model=/bundle/transformers.js&library=/lib"
        too_long = node("model_page.mjs", url=page + model, prompt="word " * 200)
        absent = node("model_page.mjs", url=page + "?model=/bundle/nowhere&library=/lib", prompt="Hi")
        foreign = node("model_page.mjs", url=page + "?library=http://other.invalid/lib", prompt="Hi")
    assert too_long["state"] == "Not possible: the message is longer than the model's context."
    assert absent["state"].startswith("It failed: ")
    assert foreign["state"] == "It failed: library must lie on this server"
    assert not any("other.invalid" in host for host in foreign["hosts"])


# The chat page, before a stand-in of the server


class Chat:
    """The page at a stand-in.

    Args:
        url: Of the page.
        seen: Requests that the stand-in got.
    """

    def __init__(self, url: str, seen: list[Any]) -> None:
        self.url, self.seen = url, seen

    def do(self, task: str, *, complaints: int = 0, **job: Any) -> Any:
        """Do something on a fresh page, which must ask no other host and must not break its policy."""
        found = node("chat_page.mjs", url=self.url, task=task, **job)
        assert found["hosts"] == [self.url.removeprefix("http://")]
        assert len(found["complaints"]) == complaints, found["complaints"]
        return found


@pytest.fixture
def chat() -> Iterator[Chat]:
    seen: list[Any] = []
    with listening(fake_chat(PAGE, seen)) as server:
        yield Chat(address(server), seen)


def test_a_message_is_sent_and_the_answer_streams(chat: Chat) -> None:
    found = chat.do("stream", model=MODELS[1])
    assert found["models"] == list(MODELS)
    assert (found["question"], found["answer"]) == ("one\ntwo", "Grüße, friend.")
    assert found["status"] == "The answer is complete."
    assert re.fullmatch(
        r"ended at the limit of new tokens · 7 tokens read, 3 written · [\d.]+ tokens per second · "
        r"first word after \d+\.\d\d s",
        found["facts"],
    )
    first, second = chat.seen
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "one\ntwo"}
    assert first == {
        "model": MODELS[1],
        "messages": [system, user],
        "temperature": 0,
        "max_tokens": 20,
        "stream": True,
        "stream_options": {"include_usage": True},
        "key": None,
    }
    answer, again = {"role": "assistant", "content": "Grüße, friend."}, {"role": "user", "content": "again"}
    assert second["messages"] == [system, user, answer, again]


def test_code_keeps_its_form_and_markup_stays_text(chat: Chat) -> None:
    found = chat.do("fences")
    assert found["code"] == ["print('<b>no</b>')\n  x = 1"]
    assert found["text"] == ["Look:", "first line\nsecond <img src=x onerror=alert(1)>"]
    assert found["images"] == 0
    assert FENCED.count("<") == 3  # the stand-in sent markup


@pytest.mark.parametrize("by", ["key", "button"])
def test_an_answer_is_stopped_and_what_was_written_stays(chat: Chat, by: str) -> None:
    found = chat.do("stop", prompt="endless", by=by, next="hello")
    assert found["writing"] == {"send": False, "busy": "true"}
    assert found["stopped"] == found["later"]
    assert "gone" in chat.seen
    said = next(one for one in chat.seen[1:] if one != "gone")["messages"][1]
    assert (said["role"], said["content"].strip()) == ("assistant", found["stopped"].strip())
    assert found["next"]["answer"] == "Grüße, friend."


def test_errors_come_in_plain_words_and_the_question_is_not_lost(chat: Chat) -> None:
    found = chat.do("errors", words=["busy", "long", "cut", "broken"], complaints=2)
    told = {word: seen["error"] for word, seen in found["found"].items()}
    assert told["busy"] == "The server is busy. Try again in 3 seconds."
    assert told["long"].startswith("This conversation is too long for the model. Begin a new chat")
    assert told["cut"] == "The connection was lost before the answer was complete."
    assert told["broken"] == "The answer broke off: the server failed"
    assert [found["found"][word]["prompt"] for word in ("busy", "long")] == ["busy", "long"]
    assert found["articles"] == 4  # two answers broke off with some words, which stay


def test_the_key_is_asked_for_and_kept_for_the_tab_only(chat: Chat) -> None:
    found = chat.do("key", key=KEY, complaints=1)
    assert found["before"]["error"].startswith("The server wants an API key")
    assert found["before"]["prompt"] == "locked door"
    assert found["open"]
    assert (found["after"]["error"], found["after"]["answer"]) == (None, "Grüße, friend.")
    stored, other, cookie = found["kept"]
    assert KEY in stored
    assert (other, cookie) == (0, "")
    assert [one["key"] for one in chat.seen] == [None, f"Bearer {KEY}"]


def test_a_new_chat_forgets_and_ends_what_runs(chat: Chat) -> None:
    found = chat.do("fresh")
    assert (found["articles"], found["visible"]) == (0, True)
    assert found["next"]["answer"] == "Grüße, friend."
    assert [one["content"] for one in chat.seen[-1]["messages"]] == ["hello"]


def test_every_control_has_a_name_and_the_page_fits_and_can_be_read(chat: Chat) -> None:
    found = chat.do("looks", pictures=os.environ.get("RK_PICTURES"))
    assert all(found["names"])
    assert len(set(found["names"])) == len(found["names"])
    assert set(found["overflow"].values()) == {0}
    light, dark = found["colours"]["light"], found["colours"]["dark"]
    assert light != dark
    for selector, text, under in (*light, *dark):
        assert contrast(text, under) >= 4.5, (selector, text, under)  # WCAG 2.2, 1.4.3


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours, as WCAG 2.2 defines it."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# The chat page, before the server


@contextmanager
def served(bundle: Path, *more: str) -> Iterator[str]:
    """Run ``rk-export serve`` on a free port; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    main = "from rk_export.cli.main import main; raise SystemExit(main())"
    command = [sys.executable, "-c", main, "serve", str(bundle), "--port", str(port), *more]
    with ExitStack() as stack:
        server = subprocess.Popen(command)
        stack.callback(server.wait, 30)
        stack.callback(server.terminate)
        for _ in range(300):
            time.sleep(0.1)
            assert server.poll() is None, "the server ended"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        yield f"http://127.0.0.1:{port}"


@pytest.mark.whole
@pytest.mark.skipif("serve" not in build_parser().format_help(), reason="there is no command serve")
def test_the_page_at_the_real_server(long_bundle: Path) -> None:
    opened = Session.from_pretrained(long_bundle, provider="cpu", threads=1)

    def answered(messages: list[dict[str, str]], most: int) -> str:
        return opened.chat(messages, GenerationOptions(max_new_tokens=most)).text

    whole = answered([user("Hi")], 3500)
    with served(long_bundle) as url:
        chat = Chat(url, [])
        found = chat.do("stream", model=long_bundle.name)
        stopped = chat.do("stop", prompt="Hi", by="key", next="again")
    messages = [{"role": "system", "content": "Be kind."}, user("one\ntwo")]
    messages += [{"role": "assistant", "content": answered(messages, 20)}, user("again")]
    assert found["answer"].split() == answered(messages, 20).split()
    assert re.search(r"\d+ tokens read, 20 written · [\d.]+ tokens per second", found["facts"])
    assert stopped["writing"] == {"send": False, "busy": "true"}
    assert stopped["stopped"] == stopped["later"]
    assert len(stopped["stopped"]) < len(whole)
    assert stopped["next"]["error"] is None


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
