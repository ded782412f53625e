"""From what the user calls a model to its folder: local, converted from GGUF, or downloaded from the hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from rk_export.errors import InputError
from rk_export.source.adapter import ADAPTER_CONFIG, Adapter, is_adapter
from rk_export.source.gguf.convert import gguf_to_folder
from rk_export.source.gguf.file import models_in
from rk_export.source.gguf.header import begins_as_gguf
from rk_export.source.remote_code import refuse_remote_code
from rk_export.source.weight_files import MISTRAL_OWN

logger = logging.getLogger(__name__)

HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model"]


def find_folder(model: str | Path) -> Path:
    """Return the folder of a model: as it is, converted from a GGUF file, or downloaded.

    Raises:
        InputError: If nothing is there.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf" and not begins_as_gguf(path):
            raise InputError(
                "is a file but not a GGUF file",
                where=str(path),
                fix="name an HF folder, a .gguf file or a hub id",
            )
        return gguf_to_folder(path)
    if not path.is_dir():
        return _download(str(model))
    files = models_in(path)
    if not files or (path / "config.json").is_file() or is_adapter(path):
        return path
    if len(files) > 1:
        raise InputError(
            f"a folder with {len(files)} GGUF files: {', '.join(file.name for file in files)}",
            where=str(path),
            fix=f"name one of them: {files[0]}",
        )
    logger.warning("%s: no config.json; read from %s", path, files[0].name)
    return gguf_to_folder(files[0])


def find_base(adapter: Adapter, base: str | Path | None) -> Path:
    """Return the folder of an adapter's base model: the given one, else the adapter's own folder, else the named one.

    Raises:
        InputError: If it is not to be had, or an adapter itself.
    """
    if base is not None:
        folder = find_folder(base)
        if adapter.base is not None and Path(adapter.base).name not in (Path(base).name, folder.name):
            logger.warning(
                "%s names %s as its base model; merged into %s, as --base asks",
                ADAPTER_CONFIG,
                adapter.base,
                base,
            )
    elif (adapter.folder / "config.json").is_file():
        folder = adapter.folder  # a whole model with an adapter in it, as transformers reads it
    else:
        folder = _named_base(adapter)
        logger.info("base model: %s, named in %s", adapter.base, ADAPTER_CONFIG)
    is_whole = folder == adapter.folder and (folder / "config.json").is_file()
    if is_adapter(folder) and not is_whole:
        raise InputError(
            "is an adapter itself",
            where=str(folder),
            fix="merge it into its base model first, and name the result",
        )
    return folder


def _named_base(adapter: Adapter) -> Path:
    """Return the folder of the base model that an adapter's configuration names."""
    where = str(adapter.folder / ADAPTER_CONFIG)
    if adapter.base is None:
        raise InputError("names no base model", where=where, fix="give it: --base MODEL")
    try:
        beside = adapter.folder / adapter.base
        return find_folder(beside) if beside.is_dir() else _found(adapter.base, adapter.revision)
    except InputError as error:
        raise InputError(
            f"its base model {adapter.base!r} is not to be had ({error.what})",
            where=where,
            fix="give --base MODEL",
        ) from error


def _found(name: str, revision: str | None) -> Path:
    return find_folder(name) if Path(name).expanduser().exists() else _download(name, revision)


def _download(name: str, revision: str | None = None) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            "no such file or folder",
            where=name,
            fix="name an HF folder, a .gguf file or a hub id like org/name",
        )
    try:
        refuse_remote_code(
            Path(snapshot_download(name, revision=revision, allow_patterns=["*.json"]))
        )  # before gigabytes come
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=HUB_PATTERNS, ignore_patterns=f"{MISTRAL_OWN}*"
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"neither a local folder nor a model that the hub delivers ({type(error).__name__})",
            where=name,
            fix="check the name, the network and, for gated models, your token",
        ) from error
