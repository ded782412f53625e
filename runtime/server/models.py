"""The models of a server: opened at the start, or when they are named where memory is limited."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rk_export.errors import InputError, RkExportError
from rk_export.memory import give_back
from rk_export.runtime.bundle_config import BundleConfig
from rk_export.runtime.bundle_files import TOKENIZER_FILE
from rk_export.runtime.encoder_graph import is_classifier_bundle, is_encoder_bundle
from rk_export.runtime.server.encoders import EncoderWorker
from rk_export.runtime.server.errors import ApiError, unavailable
from rk_export.runtime.server.logs import event, logger
from rk_export.runtime.server.opened import Decoder, memory_of, open_bundle
from rk_export.runtime.server.settings import ServerSettings


@dataclass
class Served:
    """A model that clients can name.

    Args:
        name: What they call it.
        folder: Its bundle.
        encoder: Whether it gives embeddings instead of texts.
        bytes: What it takes in memory once it is open, by its files and its buffers.
        created: When its graph was written, in seconds since the epoch.
        opened: The open bundle, or None.
        uses: Requests that it is answering.
        last_used: When the last of them began, by a monotonic clock.
    """

    name: str
    folder: Path
    encoder: bool
    bytes: int
    created: int
    opened: Decoder | EncoderWorker | None = None
    uses: int = 0
    last_used: float = 0.0

    @property
    def faulty(self) -> bool:
        """Whether it is open, but its engine has ended."""
        opened = self.opened  # another thread may close it meanwhile
        return isinstance(opened, Decoder) and not opened.engine.alive

    def release(self) -> None:
        """End one use."""
        self.uses -= 1

    def entry(self) -> dict[str, Any]:
        """Return the model as ``/v1/models`` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "rk-export",
            "kind": "embedding" if self.encoder else "text",
            "loaded": self.opened is not None,
        }


class Models:
    """The models of a server by name.

    Args:
        folders: Bundles by the names that clients use.
        settings: How they are opened, and under which memory limit.

    Raises:
        InputError: A folder is no bundle, or one alone is larger than the limit.
    """

    def __init__(self, folders: Mapping[str, Path], settings: ServerSettings) -> None:
        self._settings = settings
        self.served = {name: _look_at(name, folder, settings) for name, folder in folders.items()}
        self._opening = asyncio.Lock()
        limit = settings.memory_limit
        for model in self.served.values():
            if limit is not None and model.bytes > limit:
                raise InputError(
                    f"{model.name} takes about {model.bytes:,} bytes, the limit is {limit:,}",
                    where="memory_limit",
                    fix="raise it, or lower --slots or --context",
                )

    def open_at_start(self) -> None:
        """Open every model, or the first one where memory is limited: a bundle that cannot be opened is told at once.

        Raises:
            InputError: One cannot be opened.
            ProviderError: The execution provider cannot be had.
        """
        names = list(self.served)
        for name in names if self._settings.memory_limit is None else names[:1]:
            self._open(self.served[name])

    async def hold(
        self, name: str, stack: ExitStack, *, encoder: bool | None = None
    ) -> Decoder | EncoderWorker:
        """Return a model that stays open until a stack is closed, opened first where need be.

        Args:
            name: The model.
            stack: Lets go of it.
            encoder: The kind that is wanted; None takes either.

        Raises:
            ApiError: No such model, one of the other kind, or there is no memory for it while others answer.
        """
        model = self.find(name)
        if encoder is not None and encoder != model.encoder:
            gives = "embeddings" if model.encoder else "texts"
            raise ApiError(400, f"{name} gives {gives} only", param="model", code="wrong_model_kind")
        model.uses += 1
        stack.callback(model.release)
        model.last_used = time.monotonic()
        if model.opened is None:
            await self._opened(model)
        assert model.opened is not None
        return model.opened

    async def decoder(self, name: str, stack: ExitStack) -> Decoder:
        """Return a model that continues texts; see `hold`."""
        found = await self.hold(name, stack, encoder=False)
        assert isinstance(found, Decoder)
        return found

    async def encoder(self, name: str, stack: ExitStack) -> EncoderWorker:
        """Return a model that gives embeddings; see `hold`."""
        found = await self.hold(name, stack, encoder=True)
        assert isinstance(found, EncoderWorker)
        return found

    def find(self, name: str) -> Served:
        """Return a model.

        Raises:
            ApiError: There is none of that name.
        """
        if name not in self.served:
            there = ", ".join(self.served)
            raise ApiError(
                404, f"no model is named {name!r}; there are: {there}", param="model", code="model_not_found"
            )
        return self.served[name]

    def of_version(self, name: str, version: str | None) -> Served:
        """Return a model; a path may name the only version that there is.

        Raises:
            ApiError: There is none of that name or version.
        """
        model = self.find(name)
        if version not in (None, "1"):
            raise ApiError(404, f"{model.name} has version 1 only", code="model_not_found")
        return model

    def close(self, *, finish: bool) -> None:
        """Close every model."""
        for model in self.served.values():
            self._shut(model, finish=finish)

    async def _opened(self, model: Served) -> None:
        async with self._opening:
            if model.opened is None:
                await self._make_room(model)
                try:
                    await asyncio.to_thread(self._open, model)
                except RkExportError as error:
                    logger.error("a model cannot be opened: %s", error)
                    raise unavailable(f"{model.name} cannot be opened", "model_failed", after=60) from error

    async def _make_room(self, wanted: Served) -> None:
        """Close idle models, those first that were not used for the longest time, until another one fits."""
        limit = self._settings.memory_limit
        while limit is not None and self._open_bytes() + wanted.bytes > limit:
            idle = [model for model in self.served.values() if model.opened is not None and model.uses == 0]
            if not idle:
                raise unavailable(
                    f"there is no memory for {wanted.name} while other models answer", "no_memory", after=5
                )
            oldest = min(idle, key=lambda model: model.last_used)
            opened, oldest.opened = oldest.opened, None  # nobody may begin to use it now
            assert opened is not None
            await asyncio.to_thread(opened.close, finish=True)
            del opened
            _collect()
            event("model closed", model=oldest.name)

    def _open_bytes(self) -> int:
        return sum(model.bytes for model in self.served.values() if model.opened is not None)

    def _open(self, model: Served) -> None:
        begin = time.monotonic()
        model.opened = open_bundle(model.folder, self._settings, encoder=model.encoder)
        event("model opened", model=model.name, seconds=round(time.monotonic() - begin, 3))

    def _shut(self, model: Served, *, finish: bool) -> None:
        opened, model.opened = model.opened, None
        if opened is not None:
            opened.close(finish=finish)


def _look_at(name: str, folder: Path, settings: ServerSettings) -> Served:
    config = BundleConfig.read(folder)
    if is_classifier_bundle(folder):
        raise InputError(
            "a classifier, and the server gives texts and vectors",
            where=str(folder),
            fix="open it with rk_export.runtime.Encoder, or give a bundle of an embedding model",
        )
    if not (folder / TOKENIZER_FILE).is_file():
        raise InputError(
            f"no {TOKENIZER_FILE} here", where=str(folder), fix="put the model's tokenizer beside the graph"
        )
    encoder = is_encoder_bundle(folder)
    size = memory_of(config, settings, encoder=encoder)
    return Served(name, folder, encoder, size, int(config.model_path.stat().st_mtime))


def _collect() -> None:
    gc.collect()
    give_back()
