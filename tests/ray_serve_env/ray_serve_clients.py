"""Clients of the sample for Ray Serve, made of OpenAI's own, which never repeats a request here."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai


@dataclass
class Told:
    """What one request brought.

    Args:
        prompt: What was asked.
        stream: Whether its answer came in pieces.
        text: The answer, or the part of it that came.
        attempts: The replicas that the request was sent to.
        error: Why the answer is not whole.
        done: Whether nothing more comes.
    """

    prompt: str
    stream: bool
    text: str = ""
    attempts: int = 0
    error: openai.APIError | None = None
    done: bool = False


@functools.cache
def client(url: str) -> openai.OpenAI:
    """Return the client of an address, which threads may share: one of their own takes each 0.1 s."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(url: str, model: str, told: Told, *, tokens: int) -> None:
    """Send a request, and note what comes as it comes."""
    completions = client(url).completions.with_raw_response
    arguments: dict[str, Any] = {
        "model": model,
        "prompt": told.prompt,
        "max_tokens": tokens,
        "temperature": 0,
    }
    try:
        response = completions.create(**arguments, stream=told.stream)
        told.attempts = int(response.headers["x-attempts"])
        parsed = response.parse()
        for part in parsed if told.stream else [parsed]:
            told.text += part.choices[0].text
    except openai.APIError as error:
        told.error = error
    told.done = True


@dataclass
class Crowd:
    """Clients that ask at the same time, one request each."""

    url: str
    model: str
    tokens: int
    told: list[Told] = field(default_factory=list)

    @contextmanager
    def asking(self, prompts: list[str]) -> Iterator[list[Told]]:
        """Ask for all prompts, every second answer streamed; at the end, wait for all answers."""
        told = [Told(prompt, stream=number % 2 == 0) for number, prompt in enumerate(prompts)]
        self.told += told
        threads = [
            threading.Thread(target=ask, args=(self.url, self.model, one), kwargs={"tokens": self.tokens})
            for one in told
        ]
        for thread in threads:
            thread.start()
        try:
            yield told
        finally:
            for thread in threads:
                thread.join()
