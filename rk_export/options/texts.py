"""Text files that something was asked of: known by name and content, not by where they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rk_export.errors import FieldError, InputError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


@dataclass(frozen=True)
class TextFile:
    """A text by name and content. Plans and bundles hold these two, never the path.

    Args:
        name: Name of the file, without folders.
        sha256: Of its bytes.
        path: Where it lies on this machine; None where only a plan names it.
    """

    name: str
    sha256: str
    path: Path | None = field(default=None, compare=False, repr=False, metadata={"saved": False})

    @classmethod
    def of(cls, path: str | PathLike[str]) -> TextFile:
        """Return a file that lies on this machine.

        Raises:
            InputError: If it cannot be read.
        """
        place = Path(path).expanduser()
        if not os.path.isfile(place):  # it takes names that cannot be any file's
            raise FieldError("no such file", where=str(path), fix="give a UTF-8 text file")
        return cls(place.name, hashlib.sha256(place.read_bytes()).hexdigest(), place)

    def found_in(self, texts: tuple[Path, ...]) -> TextFile:
        """Return it with the path of the one among some files that has its content, where one has.

        It keeps its name, whatever that file is called: what names it stays the same.
        """
        if self.path is not None:
            return self
        paths = (text.path for text in map(TextFile.of, texts) if text.sha256 == self.sha256)
        return replace(self, path=next(paths, None))

    def place(self) -> Path:
        """Return where it lies.

        Raises:
            InputError: If that is not known here.
        """
        if self.path is None:
            raise InputError(
                f"the text {self.name} (sha256 {self.sha256[:12]}) is not at hand: a plan names texts by content",
                where="--calibration-text",
                fix="give the file itself with --calibration-text FILE",
            )
        return self.path


# Where a recipe file lies, while it is read.
_FOLDER: ContextVar[Path] = ContextVar("folder", default=Path())


@contextmanager
def texts_beside(folder: Path) -> Iterator[None]:
    """Let paths of texts that are read inside start at a folder, where a file lies there."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


class _Path:
    """Reads the path of a file on this machine as well as name and digest."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema as schema

        def opened(data: Any) -> Any:
            if isinstance(data, Mapping) and "path" in data:
                raise FieldError("it has a path already", where="path", fix="give the path alone")
            if not isinstance(data, str):
                return data
            beside = _FOLDER.get() / data
            return TextFile.of(beside if os.path.isfile(beside) else data)

        named = handler(source)
        written = schema.union_schema([schema.str_schema(), named])
        return schema.no_info_before_validator_function(opened, named, json_schema_input_schema=written)


# A text in a recipe file: its path, or its name and digest.
TextSource = Annotated[TextFile, _Path()]
