"""Servers on this machine for pages in a test: files, and a stand-in of the chat server that does as it is told."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODELS = ("tiny", "other model")
KEY = "a key of the test"
FENCED = (
    "Look:\n\n```python\nprint('<b>no</b>')\n  x = 1\n```\nfirst line\nsecond <img src=x onerror=alert(1)>"
)


@contextmanager
def listening(handler: Any) -> Iterator[ThreadingHTTPServer]:
    """Serve on a free port of 127.0.0.1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


class Files(SimpleHTTPRequestHandler):
    """Serves folders under names of their own.

    Args:
        folders: First part of the path -> folder.
    """

    def __init__(self, *arguments: Any, folders: Mapping[str, Path]) -> None:
        self.folders = folders
        super().__init__(*arguments)

    def translate_path(self, path: str) -> str:
        first, _, rest = path.partition("?")[0].lstrip("/").partition("/")
        return str(self.folders[first] / rest) if first in self.folders else "/nowhere"

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


def files(folders: Mapping[str, Path]) -> Any:
    """Return a handler for `listening`."""
    return partial(Files, folders=folders)


def policy(page: str) -> str:
    """Return a content security policy under which this page's own style and script run, and nothing else."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", page, re.S)
    }
    return (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; "
        f"style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'"
    )


class FakeChat(BaseHTTPRequestHandler):
    """The routes that the page calls; the last message says what happens.

    Args:
        page: The file that is served at ``/``.
        seen: Receives every chat request, and ``gone`` where the client leaves before the end.
    """

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, page: Path, seen: list[Any]) -> None:
        self.page, self.seen = page, seen
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == "/":
            text = self.page.read_text(encoding="utf-8")
            self._send(
                200, text.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy(text)}
            )
        elif self.path == "/v1/models":
            listed = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in MODELS]
            self._json(200, {"object": "list", "data": listed})
        else:
            self._json(404, {"error": {"message": "no such route"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({**body, "key": self.headers.get("Authorization")})
        word = body["messages"][-1]["content"].split()[0]
        if word == "busy":
            self._json(429, _error("as many requests are waiting as may", "queue_full"), {"Retry-After": "3"})
        elif word == "long":
            self._json(400, _error("9 tokens do not fit into a context of 8", "context_length_exceeded"))
        elif word == "locked" and self.headers.get("Authorization") != f"Bearer {KEY}":
            self._json(401, _error("no key", "invalid_api_key"))
        else:
            self._stream(word)

    def _stream(self, word: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for piece in _pieces(word):
                self._event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
                time.sleep(0.02)
            if word == "cut":
                return
            if word == "broken":
                self._event(_error("the server failed", "internal_error"))
                return
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.seen.append("gone")

    def _event(self, value: Any) -> None:
        # A piece may arrive in parts: a character of several bytes is cut in two here.
        data = b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
        middle = data.find(b"\xc3") + 1 or len(data) // 2
        for part in (data[:middle], data[middle:]):
            self.wfile.write(part)
            self.wfile.flush()

    def _json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers or {})

    def _send(self, status: int, data: bytes, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def fake_chat(page: Path, seen: list[Any]) -> Any:
    """Return a handler for `listening`."""
    return partial(FakeChat, page=page, seen=seen)


def _pieces(word: str) -> Iterator[str]:
    if word == "fences":
        yield from FENCED.splitlines(keepends=True)
    elif word == "endless":
        for number in range(2000):
            yield f"{number} "
    else:
        yield from ("Grüße", ", ", "friend.")


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": None, "code": code}}
