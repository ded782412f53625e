"""What the measurements of the server share: a server process on loopback, prompts, and reading a stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from rk_export.errors import InputError
from rk_export.runtime.bundle_files import TOKENIZER_FILE
from rk_export.runtime.text import TextCodec

NAME = "model"
_PROSE = Path(__file__).parents[2] / "docs" / "explanation" / "methods.md"
_END_SECONDS = 60


@dataclass(frozen=True)
class Served:
    """A running server.

    Args:
        url: Its address.
        pid: Its process.
    """

    url: str
    pid: int


@contextmanager
def server(bundle: Path, *words: object) -> Iterator[Served]:
    """Serve a bundle in a process of its own while a block runs.

    Raises:
        InputError: The server did not start, or did not end well.
    """
    fixed = ("--port", 0, "--name", NAME, "--provider", "cpu", "--quiet")
    line = [sys.executable, "-m", "rk_export.cli.main", "serve", bundle, *fixed, *words]
    with subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split(" ")[0]
            if not url.startswith("http://127.0.0.1:"):
                raise InputError("the server did not start", where=str(bundle), fix="see its message above")
            yield Served(url, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode != 0:
        raise InputError(f"the server ended with status {process.returncode}", where=str(bundle))


def prompts(bundle: Path, count: int, least: int, most: int, seed: int = 0) -> list[list[int]]:
    """Return token ids of pieces of prose, no two of which begin alike.

    Args:
        bundle: Whose tokenizer is used.
        count: Prompts.
        least: Tokens of the shortest.
        most: Tokens of the longest.
        seed: Of the lengths and places.
    """
    tokens = TextCodec(bundle / TOKENIZER_FILE).encode(
        _PROSE.read_text(encoding="utf-8"), special_tokens=False
    )
    rng = np.random.default_rng(seed)
    starts = rng.permutation(len(tokens) - most)[:count]
    return [tokens[start : start + int(rng.integers(least, most + 1))] for start in map(int, starts)]


def body(prompt: list[int], new_tokens: int, **more: Any) -> dict[str, Any]:
    """Return the body of a greedy completion."""
    return {"model": NAME, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, **more}


async def events(answer: httpx.Response) -> AsyncIterator[tuple[float, dict[str, Any]]]:
    """Yield every event of a stream with the second at which it came.

    Raises:
        RuntimeError: The stream ends with an error, or too early.
    """
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            return
        if line:
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            yield time.perf_counter(), event
    raise RuntimeError("the stream ended without its end mark")


def load_average() -> float:
    """Return the processes that wanted a core in the last minute: figures are worth less under load."""
    return round(os.getloadavg()[0], 1)
