"""Open bundles: what they take in memory, and what runs their requests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rk_export.errors import InputError
from rk_export.runtime.bundle_config import BundleConfig
from rk_export.runtime.bundle_files import read_json
from rk_export.runtime.chat_files import TemplateFiles
from rk_export.runtime.encoder import EncoderSession
from rk_export.runtime.engine.engine import Engine
from rk_export.runtime.engine.records import EngineOptions
from rk_export.runtime.server.encoders import EncoderWorker
from rk_export.runtime.server.json_schema import GrammarTokens
from rk_export.runtime.server.settings import DEFAULT_CONTEXT, ServerSettings
from rk_export.runtime.session import Session

_CLOSE_SECONDS = 10.0
_FLOAT = 4  # bytes of a key's or value's element, at most


@dataclass(frozen=True)
class Decoder:
    """An open decoder bundle: it continues texts.

    Args:
        session: The bundle.
        engine: What runs its requests.
        limit: Most positions of prompt and answer together.
    """

    session: Session
    engine: Engine
    limit: int

    @property
    def grammar(self) -> GrammarTokens:
        """The tokenizer for grammars and for the bytes of tokens.

        Raises:
            InputError: llguidance cannot read it.
        """
        if isinstance(found := self._grammar, InputError):
            raise InputError(found.what, where=found.where, fix=found.fix)
        return found

    @property
    def byte_tokens(self) -> GrammarTokens | None:
        """The same, or None where llguidance cannot read it; the first use takes seconds with a large vocabulary."""
        found = self._grammar
        return None if isinstance(found, InputError) else found

    @cached_property
    def _grammar(self) -> GrammarTokens | InputError:
        # A failure is kept too: it would come again, after the same time.
        config = self.session.config
        try:
            return GrammarTokens(config.folder, self.session.rows, sorted(config.eos_ids))
        except InputError as error:
            return error.with_traceback(None)

    @cached_property
    def template(self) -> str:
        """The text of all chat templates; empty where there is none."""
        return "\n".join(TemplateFiles.read(self.session.config.folder).sources.values())

    def close(self, *, finish: bool) -> None:
        """End the engine's thread."""
        self.engine.close(finish=finish, timeout=_CLOSE_SECONDS)


def memory_of(config: BundleConfig, settings: ServerSettings, *, encoder: bool) -> int:
    """Return the bytes that a bundle takes once it is open, by its files and the buffers of its slots."""
    return _file_bytes(config.folder) + (0 if encoder else _cache_bytes(config, settings))


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model.onnx*") if path.is_file())


def _cache_bytes(config: BundleConfig, settings: ServerSettings) -> int:
    """Return the bytes of keys and values of all slots and kept prefixes; 0 where the configuration does not tell."""
    stated = read_json(config.folder / "config.json")
    nested = stated.get("text_config")
    layers = (nested if isinstance(nested, dict) else stated).get("num_hidden_layers")
    if not isinstance(layers, int) or config.kv_heads is None or config.head_size is None:
        return 0
    options = settings.engine
    rows = (options.slots + options.kept_prefixes) * _capacity(config.context_length, options)
    return 2 * layers * config.kv_heads * config.head_size * _FLOAT * rows


def _capacity(context: int | None, options: EngineOptions) -> int:
    return options.capacity or min(context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def open_bundle(folder: Path, settings: ServerSettings, *, encoder: bool) -> Decoder | EncoderWorker:
    """Open a bundle and start what runs its requests.

    Raises:
        InputError: It cannot be opened.
        ProviderError: The execution provider cannot be had.
    """
    how = settings.session
    if encoder:
        opened = EncoderSession.from_pretrained(
            folder, provider=how.provider, threads=how.threads, spinning=how.spinning
        )
        return EncoderWorker(opened, settings.engine.queue)
    known = BundleConfig.read(folder).context_length
    limit = _capacity(known, settings.engine)
    session = _session(folder, settings, max_length=limit)
    options = replace(settings.engine, capacity=limit)
    # Read here, so that a broken file is told now and not by a request.
    session.text_codec, session.config.ends, session.rows  # noqa: B018
    draft = None if settings.draft is None else _session(settings.draft, settings)
    return Decoder(session, Engine(session, options, draft), limit)


def _session(folder: Path, settings: ServerSettings, max_length: int | None = None) -> Session:
    how = settings.session
    return Session.from_pretrained(
        folder, provider=how.provider, threads=how.threads, spinning=how.spinning, max_length=max_length
    )
