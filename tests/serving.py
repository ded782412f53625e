"""Runs the server of `rk-export serve` in a thread, on a free port, for tests that speak to it over HTTP."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import runtime_models
import uvicorn
from openai import OpenAI
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from rk_export.runtime.engine import EngineOptions
from rk_export.runtime.providers import SessionSettings
from rk_export.runtime.server.app import create_app
from rk_export.runtime.server.context import Context
from rk_export.runtime.server.models import Models
from rk_export.runtime.server.opened import Decoder
from rk_export.runtime.server.serve import Server, listen
from rk_export.runtime.server.settings import ServerSettings

CPU = SessionSettings("cpu", 1)
# Shows tools, in the form that many models have.
TOOL_TEMPLATE = (
    "{% if tools %}[tools]{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
    "<tool_call>{% endif %}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% for call in message.tool_calls %}{{ call.function.arguments.items() | list }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ mood }}"
)


def write_decoder(
    folder: Path, *, context: int = 1024, template: str | None = None, seed: int = 0, ends: bool = False
) -> Path:
    """Write a tiny decoder bundle with a longer context than usual; without ``ends`` no token ends an answer."""
    decoder = runtime_models.TinyDecoder(seed=seed, context=context)
    decoder.write(folder, eos=runtime_models.EOS if ends else [])
    if not ends:
        (folder / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@dataclass
class Running:
    """A server that answers.

    Args:
        url: Where.
        context: What it works on.
        server: The server itself.
        key: What clients send.
        loop: The server's event loop.
        server_thread: The thread in which it runs.
    """

    url: str
    context: Context
    server: Server
    key: str = "no key at all"
    loop: asyncio.AbstractEventLoop | None = None
    server_thread: threading.Thread | None = None
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    def client(self) -> OpenAI:
        """Return OpenAI's client; it does not try again."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Send JSON."""
        return self.http.post(f"{self.url}{path}", json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Ask for a page."""
        return self.http.get(f"{self.url}{path}", **options)

    def decoder(self, name: str = "tiny") -> Decoder:
        """Return an open model."""
        found = self.context.models.served[name].opened
        assert isinstance(found, Decoder)
        return found

    @contextmanager
    def held(self, name: str = "tiny") -> Iterator[None]:
        """Keep a model's engine from making a step."""
        engine, release, begun = self.decoder(name).engine, threading.Event(), threading.Event()

        def wait() -> None:
            begun.set()
            release.wait(60)

        async def hold() -> None:
            await engine.run(wait)

        assert self.loop is not None
        holding = asyncio.run_coroutine_threadsafe(hold(), self.loop)
        assert begun.wait(60)
        try:
            yield
        finally:
            release.set()
            holding.result(60)

    def until(self, holds: Callable[[], bool], seconds: float = 20) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.005)


@contextmanager
def serving(models: Mapping[str, Path], **settings: Any) -> Iterator[Running]:
    """Serve bundles while a block runs; ``settings`` are fields of `ServerSettings`."""
    settings.setdefault("session", CPU)
    settings.setdefault("engine", EngineOptions(slots=4, queue=16))
    chosen = ServerSettings(port=0, **settings)
    listener, announced = listen(chosen.host, chosen.port), threading.Event()
    app = create_app(Models(models, chosen), chosen, address=listener.getsockname()[0])
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    server = Server(config, app.state.context, announced.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not announced.wait(0.02):
        assert server.failure is None, server.failure
        assert thread.is_alive()
        assert time.monotonic() < end
    port = listener.getsockname()[1]
    key = chosen.keys[0] if chosen.keys else "no key at all"
    running = Running(f"http://127.0.0.1:{port}", app.state.context, server, key)
    running.loop, running.server_thread = server._loop, thread
    try:
        yield running
    finally:
        if thread.is_alive() and not running.context.state.draining:
            server.handle_exit(signal.SIGTERM, None)
        running.http.close()
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


SCHEMAS: dict[str, type[BaseModel]] = {
    "chat.completion": ChatCompletion,
    "chat.completion.chunk": ChatCompletionChunk,
    "text_completion": Completion,
    "model": Model,
}
OURS = {"kind", "loaded"}  # fields of a model that OpenAI does not have


def checked(value: dict[str, Any]) -> dict[str, Any]:
    """Return an object after OpenAI's own types have found nothing wrong or unknown in it."""
    kind = value["object"]
    if kind == "list":
        if value["data"] and value["data"][0]["object"] == "embedding":
            CreateEmbeddingResponse.model_validate_json(json.dumps(value), strict=True)
        else:
            assert [checked(item) for item in value["data"]]
        return value
    given = json.loads(json.dumps(value))
    if kind == "text_completion":
        for choice in given["choices"]:
            # The published type has no null here, the interface sends it in every chunk but the last.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
    _no_extras(SCHEMAS[kind].model_validate_json(json.dumps(given), strict=True))
    return value


def _no_extras(model: BaseModel) -> None:
    assert set(model.model_extra or {}) <= OURS, model.model_extra
    for _, value in model:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                _no_extras(item)


@dataclass
class Streamed:
    """The chunks of a stream."""

    chunks: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    done: bool = False

    def text(self, index: int = 0) -> str:
        """Return the text of one choice."""
        parts = [choice for chunk in self.chunks for choice in chunk["choices"] if choice["index"] == index]
        return "".join(part.get("text") or part.get("delta", {}).get("content") or "" for part in parts)


def streamed(lines: Sequence[str] | Iterator[str]) -> Streamed:
    """Return what server-sent events hold, every chunk checked."""
    found = Streamed()
    for line in lines:
        if not line:
            continue
        assert line.startswith("data: ")
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            found.done = True
            continue
        value = json.loads(data)
        if "error" in value:
            found.error = value["error"]
        else:
            found.chunks.append(checked(value))
    return found


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of a response in OpenAI's form, after a look at that form."""
    found = response.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert isinstance(found["error"]["message"], str)
    error: dict[str, Any] = found["error"]
    return error
