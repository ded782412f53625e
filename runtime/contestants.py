"""What a benchmark runs: each runtime behind the same three calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rk_export.errors import InputError, ProviderError
from rk_export.inside import check_links, checked_name, file_inside
from rk_export.runtime.bundle_files import Section, read_json
from rk_export.runtime.decoder import Decoder
from rk_export.runtime.engine.batch import Batch
from rk_export.runtime.engine.open_batch import open_batch
from rk_export.runtime.engine.records import EngineOptions
from rk_export.runtime.engine.running import Running
from rk_export.runtime.generate import Row
from rk_export.runtime.graph_proto import check_graph
from rk_export.runtime.options import GenerationOptions
from rk_export.runtime.providers import Provider
from rk_export.runtime.session import Session

_WRITTEN = re.compile(r"profil|optimized_model|_path$")  # enable_profiling, ep.context_file_path ...
_NATIVE_CODE = re.compile(r"librar|_lib_|plugin")  # custom_ops_library, trt_extra_plugin_lib_paths ...


class Contestant(Protocol):
    """One runtime with one model, greedy, batch of one."""

    name: str
    vocab_size: int  # ids below it are tokens
    max_length: int  # most positions of prompt and new tokens together

    def reset(self, capacity: int) -> None:
        """Forget everything and make room for ``capacity`` positions; not timed."""

    def prefill(self, input_ids: np.ndarray) -> None:
        """Run a prompt [length] and choose the first new token."""

    def decode(self, count: int) -> None:
        """Run the graph ``count`` times, choosing a token each time; end-of-sequence tokens end nothing."""


class BundleContestant:
    """A bundle folder run by this package.

    Args:
        path: The bundle.
        provider: As for ``Session.from_pretrained``.
        threads: Threads within one operator.

    Raises:
        InputError: The bundle cannot be opened or does not tell its vocabulary size.
    """

    def __init__(self, path: str | Path, *, provider: Provider = "cpu", threads: int | None = None) -> None:
        self.name = str(path)
        self.session = Session.from_pretrained(path, provider=provider, threads=threads)
        if self.session.rows is None:
            raise InputError("no vocab_size is known", where=str(path), fix="put config.json in the bundle")
        self.vocab_size, self.max_length = self.session.rows, self.session.max_length
        self._decoder: Decoder | None = None
        self._token = 0

    def reset(self, capacity: int) -> None:
        """Start a fresh decoder."""
        self._decoder = self.session.decoder(batch=1, capacity=capacity)

    def prefill(self, input_ids: np.ndarray) -> None:
        """Run the prompt."""
        self._token = int(self._ready().prefill(input_ids[None])[0].argmax())

    def decode(self, count: int) -> None:
        """Run ``count`` steps."""
        decoder = self._ready()
        for _ in range(count):
            self._token = int(decoder.step(np.array([self._token]))[0].argmax())

    def _ready(self) -> Decoder:
        if self._decoder is None:
            raise InputError("it was not reset", where=self.name, fix="call reset first")
        return self._decoder


class GuessingContestant:
    """A bundle folder run by this package with guesses; see `rk_export.runtime.engine.ahead`.

    Args:
        path: The bundle.
        draft: A smaller bundle that guesses; None guesses from what the text said before.
        provider: As for ``Session.from_pretrained``.
        threads: Threads within one operator.

    Raises:
        InputError: A bundle cannot be opened, nothing can be guessed for it, or it does not tell its vocabulary size.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        draft: str | Path | None = None,
        provider: Provider = "cpu",
        threads: int | None = None,
    ) -> None:
        self.name = f"{path} with lookup" if draft is None else f"{path} with draft {draft}"
        plain = BundleContestant(path, provider=provider, threads=threads)
        self.vocab_size, self.max_length = plain.vocab_size, plain.max_length
        self._session = plain.session
        small = None if draft is None else Session.from_pretrained(draft, provider=provider, threads=threads)
        self._draft, self._capacity = small, 0
        self._batch: Batch | None = None
        self._running: Running | None = None
        self.guesses = self.right_guesses = 0

    def reset(self, capacity: int) -> None:
        """Make an empty batch."""
        options = EngineOptions(capacity=capacity, kept_prefixes=0, lookup=self._draft is None)
        self._batch, _ = open_batch(self._session, options, self._draft)
        self._capacity = capacity

    def prefill(self, input_ids: np.ndarray) -> None:
        """Run the prompt and choose a token."""
        tokens = [int(token) for token in input_ids]
        options = GenerationOptions(max_new_tokens=self._capacity - len(tokens))
        self._running = Running(Row(tokens, options, None, frozenset()))
        self._ready().add(self._running)
        self._until(1)

    def decode(self, count: int) -> None:
        """Run steps until so many tokens were chosen."""
        if self._running is None:
            raise InputError("it was not prefilled", where=self.name, fix="call prefill first")
        self._until(len(self._running.row.tokens) + count)
        self.guesses += self._running.drafted
        self.right_guesses += self._running.accepted

    def _until(self, tokens: int) -> None:
        running = self._running
        while running is not None and len(running.row.tokens) < tokens:
            self._ready().step()
            if running.failure is not None:
                raise running.failure

    def _ready(self) -> Batch:
        if self._batch is None:
            raise InputError("it was not reset", where=self.name, fix="call reset first")
        return self._batch


class GenAIContestant:
    """ONNX Runtime GenAI on a bundle folder.

    Args:
        path: A folder with ``genai_config.json``.
        provider: ``cpu`` or ``cuda``; ``auto`` means what ``genai_config.json`` says.
        threads: Threads within one operator.

    Raises:
        InputError: The folder is no GenAI bundle, or its configuration names a library of native code.
        ProviderError: onnxruntime-genai is not installed.
    """

    def __init__(self, path: str | Path, *, provider: Provider = "cpu", threads: int | None = None) -> None:
        self.name = f"genai:{path}"
        self._og = _import_genai()
        self.vocab_size, self.max_length = genai_settings(Path(path))
        self._model = self._og.Model(self._config(str(path), provider, threads))
        self._generator: Any = None

    def reset(self, capacity: int) -> None:
        """Start a fresh generator."""
        params = self._og.GeneratorParams(self._model)
        # A minimum as long as the maximum keeps the end-of-sequence token from ending the run.
        params.set_search_options(do_sample=False, max_length=capacity, min_length=capacity)
        self._generator = self._og.Generator(self._model, params)

    def prefill(self, input_ids: np.ndarray) -> None:
        """Run the prompt; GenAI chooses its token from logits that are already there."""
        self._generator.append_tokens(input_ids[None].astype(np.int32))
        self._generator.generate_next_token()

    def decode(self, count: int) -> None:
        """Run ``count`` steps."""
        for _ in range(count):
            self._generator.generate_next_token()

    def _config(self, path: str, provider: Provider, threads: int | None) -> Any:
        config = self._og.Config(path)
        if provider != "auto":
            config.clear_providers()
        if provider == "cuda":
            config.append_provider("cuda")
        if threads is not None:
            overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
            config.overlay(json.dumps(overlay))
        return config


def genai_settings(folder: Path) -> tuple[int, int]:
    """Check what GenAI is told to load before it gets the folder.

    Returns:
        Tokens of the vocabulary, and of the context.

    Raises:
        InputError: The folder is no GenAI bundle, or its configuration names native code or a file outside.
    """
    config_file = folder / "genai_config.json"
    if not config_file.is_file():
        raise InputError("no such file", where=str(config_file), fix="give a bundle made for GenAI")
    settings = read_json(config_file)
    _refuse_native_code(settings, config_file)
    _refuse_other_places(settings, config_file)
    model = Section(settings, str(config_file)).section("model")
    return _needed(model, "vocab_size"), _needed(model, "context_length")


def _refuse_native_code(settings: dict[str, Any], config_file: Path) -> None:
    """GenAI loads the libraries that its configuration names, and loading one runs what is in it."""
    for entry, value in _entries(settings):
        if _NATIVE_CODE.search(entry) and value:
            raise InputError(
                f"{entry} names native code, {json.dumps(value)}, which is never loaded",
                where=str(config_file),
                fix="delete the entry; what rk-export writes needs none",
            )


def _refuse_other_places(settings: dict[str, Any], config_file: Path) -> None:
    """GenAI opens the files that its configuration names, and writes some; all must lie in the folder.

    Raises:
        InputError: An entry names a file outside the folder, or has one written, or a graph reads such a file.
    """
    folder, where = config_file.parent, str(config_file)
    check_links(folder)
    for entry, value in _entries(settings):
        if _WRITTEN.search(entry) and value:
            raise InputError(
                f"{entry} has GenAI write files", where=where, fix="delete the entry; a benchmark needs none"
            )
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and name.endswith(".onnx"):
                check_graph(file_inside(folder, name, where=where))
            elif isinstance(name, str) and name:
                checked_name(name, where=where)


def _needed(model: Section, name: str) -> int:
    value = model.count(name)
    if value is None:
        raise InputError(f"{name} is missing", where=model.where, fix="give a bundle made for GenAI")
    return value


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield key and value of each entry of a JSON object and of the objects inside it."""
    inside = value if isinstance(value, list) else []
    if isinstance(value, dict):
        yield from value.items()
        inside = list(value.values())
    for item in inside:
        yield from _entries(item)


def _import_genai() -> Any:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise ProviderError(
            "onnxruntime-genai cannot be imported", where="genai:", fix="pip install 'rk-export[genai]'"
        ) from error
    return onnxruntime_genai
