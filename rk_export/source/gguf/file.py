"""An opened GGUF model: one file, or all shards of a split one, as one set of metadata and tensors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rk_export.errors import InputError
from rk_export.manifest import sha256_of
from rk_export.source.gguf.header import Header, StoredTensor, read_header

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_LISTED = 4


@dataclass(frozen=True)
class GgufFile:
    """An opened GGUF model.

    Attributes:
        paths: The file, or its shards in order; the first has the metadata.
        metadata: Values by key.
        tensors: Tensors of all shards by their GGUF name.
    """

    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def path(self) -> Path:
        """The file that holds the metadata."""
        return self.paths[0]

    @property
    def stem(self) -> str:
        """The model's file name without suffix and shard number."""
        match = _SHARD.fullmatch(self.path.stem)
        return match["stem"] if match and len(self.paths) > 1 else self.path.stem

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value, floats rounded to the shortest decimal that float32 tells apart."""
        value = self.metadata.get(key, default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def model_key(self, suffix: str, default: Any = None) -> Any:
        """Return the value of ``{architecture}.{suffix}``."""
        return self.get(f"{self.architecture}.{suffix}", default)

    def number(self, suffix: str) -> int | float | None:
        """Return a numeric value of ``{architecture}.{suffix}``, InputError when it is something else."""
        value = self.model_key(suffix)
        if value is None or isinstance(value, int | float):
            return value
        raise InputError(f"{self.architecture}.{suffix} is {value!r}, no number", where=str(self.path))

    def required(self, suffix: str) -> Any:
        """Return the value of ``{architecture}.{suffix}``, InputError when it is absent."""
        value = self.model_key(suffix)
        if value is None:
            raise InputError(
                f"the metadata does not state {self.architecture}.{suffix}",
                where=str(self.path),
                fix="the file is incomplete: take another conversion of this model",
            )
        return value

    def digest(self) -> str:
        """Return the SHA-256 of the file, or of the digests of all shards."""
        digests = [sha256_of(path) for path in self.paths]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def models_in(folder: Path) -> list[Path]:
    """Return a file for each GGUF language model in a folder: one shard stands for all of its model."""
    models: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        if "mmproj" not in path.name.lower():  # an image encoder, by the name that llama.cpp gives it
            match = _SHARD.fullmatch(path.stem)
            models.setdefault(f"{match['stem']} of {match['count']}" if match else path.name, path)
    return list(models.values())


def open_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and of all its shards when it is one of several.

    Raises:
        InputError: A file is missing or damaged, or the shards do not belong together.
        UnsupportedModelError: The format is one that is not read.
    """
    header = read_header(path)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int):
        raise InputError(f"split.count is {count!r}, no number", where=str(path), fix="download it again")
    if count <= 1:
        return GgufFile((path,), header.metadata, {tensor.name: tensor for tensor in header.tensors})
    paths = _shard_paths(path, count)
    headers = [header if shard == path else read_header(shard) for shard in paths]
    for number, (shard, part) in enumerate(zip(paths, headers, strict=True)):
        _check_shard(shard, part, number, headers[0])
    return GgufFile(paths, headers[0].metadata, _joined(paths, headers))


def _shard_paths(path: Path, count: int) -> tuple[Path, ...]:
    """Return the paths of all shards beside one of them."""
    match = _SHARD.fullmatch(path.stem)
    if match is None or int(match["count"]) != count:
        raise InputError(
            f"it is one of {count} shards, but its name does not end in -00001-of-{count:05d}.gguf",
            where=str(path),
            fix="give all shards the names they were published under",
        )
    paths = [path.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    missing = [shard.name for shard in paths if not shard.is_file()]
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise InputError(
            f"{len(missing)} of {count} shards are missing: {', '.join(missing[:_LISTED])}{more}",
            where=str(path.parent),
            fix="put all shards into one folder",
        )
    return tuple(paths)


def _check_shard(path: Path, shard: Header, number: int, first: Header) -> None:
    """A shard has the place that its name says, and belongs to the same model as the first."""
    found = shard.metadata.get("split.no")
    if found != number:
        place = f"says that it is shard {found + 1}" if isinstance(found, int) else "has no split.no"
        raise InputError(
            f"shard {number + 1} {place}", where=str(path), fix="undo the renaming, or download it again"
        )
    for key in ("split.count", "split.tensors.count", "general.architecture", "general.name"):
        # Later shards need not repeat what describes the model; what they state must agree.
        stated = shard.metadata.get(key, None if key.startswith("split.") else first.metadata.get(key))
        if stated != first.metadata.get(key):
            raise InputError(
                f"the shards are not of one model: {key} is {stated!r} here and {first.metadata.get(key)!r} "
                "in the first",
                where=str(path),
                fix="put the shards of one model into a folder of their own",
            )


def _joined(paths: tuple[Path, ...], headers: list[Header]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path, header in zip(paths, headers, strict=True):
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise InputError(
                    f"the shards are not of one model: {tensor.name} lies in {tensors[tensor.name].path.name} too",
                    where=str(path),
                    fix="put the shards of one model into a folder of their own",
                )
            tensors[tensor.name] = tensor
    stated = headers[0].metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise InputError(
            f"the shards hold {len(tensors)} tensors, their headers state {stated}",
            where=str(paths[0].parent),
            fix="put the shards of one model into a folder of their own, or download them again",
        )
    return tensors
