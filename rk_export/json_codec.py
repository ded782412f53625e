"""Our frozen dataclasses as JSON, and back with the place of what does not fit.

pydantic does the reading, on the dataclasses as they are: no field may be missing or unknown, a number is no string
and a flag is no number. It is imported when something is read, so that `import rk_export` stays light.
"""

from __future__ import annotations

import enum
import json
import math
import reprlib
import stat
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from rk_export.errors import InputError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, TypeAdapter
    from pydantic_core import CoreSchema, ErrorDetails

T = TypeVar("T")

_WRITE_AGAIN = "correct it, or write the file again with this rk-export"
# The largest files in use are tokenizers: 262,144 tokens with their merges are 33 MB of 2 million values.
_MOST_BYTES = 1 << 27
_MOST_VALUES = 1 << 22  # of up to 200 bytes each in memory
_DEEPEST = 64
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


class _NonFinite:
    """Reads the strings that stand for floats which JSON does not know."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core.core_schema import no_info_before_validator_function

        return no_info_before_validator_function(_float_of, handler(source))


# A field that may hold an infinity or NaN: `to_json` writes "inf", "-inf" or "nan".
Float = Annotated[float, _NonFinite()]


def to_json(value: Any) -> Any:
    """Return a value as `json.dumps` takes it: dataclasses as objects, tuples as arrays, enumerations by value.

    A field whose metadata say ``saved: False`` is left out, and one with a ``key`` stands under that name. A dataclass
    with a `json_tag` stands under that name; one with `bare` is the value of that field, where it has no other; one
    with `json_form` says itself what it is.

    Floats that JSON cannot hold become strings: ``"inf"``, ``"-inf"``, ``"nan"``.
    """
    if hasattr(value, "json_form"):
        return to_json(value.json_form())
    if is_dataclass(value):
        saved: Any = {
            item.metadata.get("key", item.name): to_json(getattr(value, item.name))
            for item in fields(value)
            if item.metadata.get("saved", True)
        }
        bare = getattr(value, "bare", None)
        if [*saved] == [bare]:
            saved = saved[bare]
        tag = getattr(value, "json_tag", None)
        return saved if tag is None else {tag: saved}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(cls: type[T], data: Any, where: str, *, fix: str = _WRITE_AGAIN) -> T:
    """Return the dataclass that `to_json` wrote.

    Args:
        cls: The class; a field without a default is required.
        data: What `json.loads` gave.
        where: The file, for messages; the path inside it is added: ``plan.json: sites[3].rank``.
        fix: What to do about a field that is missing, unknown or of the wrong type.

    Raises:
        InputError: A field is missing, unknown or of the wrong type, or its value is refused.
    """
    try:
        return read(cls, data)
    except MisfitError as error:
        raise _refusal(error, where, fix) from error


class MisfitError(Exception):
    """Data that are no `cls`.

    Args:
        path: Keys and indices that lead to the place.
        what: What is wrong there.
        unknown: Whether the last key of the path is a field that does not exist.
        cause: The refusal of one of our classes, if it was one.
    """

    def __init__(
        self,
        path: tuple[int | str, ...],
        what: str,
        *,
        unknown: bool = False,
        cause: InputError | None = None,
    ) -> None:
        super().__init__(what)
        self.path, self.what, self.unknown, self.cause = path, what, unknown, cause


def read(cls: type[T], data: Any) -> T:
    """Return the dataclass that `to_json` wrote.

    Raises:
        MisfitError: A field is missing, unknown or of the wrong type, or its value is refused.
    """
    from pydantic import ValidationError

    kind: Any = cls
    try:
        # As text, because only there an array is as good as a tuple, and a string as an enumeration.
        (value,) = _reader(kind).validate_json(json.dumps([data]))
    except ValidationError as error:
        raise _misfit(error.errors()) from error
    found: T = value
    return found


def _misfit(found: list[ErrorDetails]) -> MisfitError:
    """Return the first misfit; where a field may be one of several kinds, what each of them says."""
    first = found[0]
    if first["type"] == "missing":  # a misspelled name explains the missing one
        first = next((one for one in found if one["type"] in _UNKNOWN), first)
    if first["type"] == "literal_error" and len(found) > 1:
        kinds = [one for one in found if one["loc"][:-1] == first["loc"][:-1]]
        said = " nor ".join(_said(one) for one in kinds)
        what = f"neither {said}; found {reprlib.repr(first['input'])}" if len(kinds) > 1 else _what(first)
        return MisfitError(first["loc"][1:-1] if len(kinds) > 1 else first["loc"][1:], what)
    cause = first.get("ctx", {}).get("error")
    unknown = first["type"] in _UNKNOWN
    what = str(cause) if cause is not None else _what(first)
    own = cause if isinstance(cause, InputError) else None
    return MisfitError(first["loc"][1:], what, unknown=unknown, cause=own)


def _said(details: ErrorDetails) -> str:
    """Return what one of several kinds wants, in a few words."""
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return f"a file ({cause.what}: {cause.where})"
    return details["msg"].removeprefix("Input should be ").removeprefix("a valid ")


def load_json(path: Path, *, fix: str) -> Any:
    """Return what a JSON file holds; the one reader of files that users bring.

    Args:
        path: The file.
        fix: What to do about one that cannot be read.

    Raises:
        InputError: No such file, a device or pipe, not JSON in UTF-8, or beyond the bounds of `parse_json`.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # it may have no end
            raise InputError("cannot be read: a pipe or a device", where=str(path), fix=fix)
        if found.st_size > _MOST_BYTES:
            raise InputError(_over("bytes", found.st_size, _MOST_BYTES), where=str(path), fix=fix)
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot be read: {reason}", where=str(path), fix=fix) from error
    except ValueError as error:  # a name with a null byte
        raise InputError(f"cannot be read: {error}", where=str(path), fix=fix) from error
    return parse_json(data, where=str(path), fix=fix)


def parse_json(data: bytes, *, where: str | None, fix: str) -> Any:
    """Return what a JSON text holds, if it takes neither much memory nor deep recursion to hold it.

    Every value but the first stands behind a bracket or a comma. So their number is known before anything is built.

    Args:
        data: The text in UTF-8.
        where: Its file, for messages; None leaves it to the caller.
        fix: What to do about one that cannot be read.

    Raises:
        InputError: Not JSON in UTF-8, or one with too many values, or nested too deeply.
    """
    values = sum(map(data.count, (b"[", b"{", b",")))
    if values > _MOST_VALUES:
        raise InputError(_over("values", values, _MOST_VALUES), where=where, fix=fix)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})", where=where, fix=fix) from error
    if _is_deep(value):
        raise InputError(f"nested deeper than {_DEEPEST} levels", where=where, fix=fix)
    return value


def _over(what: str, found: int, most: int) -> str:
    return f"too large for such a file: {found:,} {what}, at most {most:,} are read"


def _is_deep(value: Any) -> bool:
    """Whether objects and arrays lie in each other deeper than any file in use has them."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for node in level
            for item in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


@cache
def _reader(cls: Hashable) -> TypeAdapter[list[Any]]:
    """Return the reader of a list of `cls`: pydantic lets no one configure a dataclass that stands alone."""
    from pydantic import ConfigDict, TypeAdapter

    listed: Any = list[cls]  # type: ignore[valid-type]
    return TypeAdapter(listed, config=ConfigDict(strict=True, extra="forbid"))


def _float_of(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value


def _refusal(misfit: MisfitError, where: str, fix: str) -> InputError:
    place = f"{where}: {path}" if (path := _path(misfit.path)) else where
    if (cause := misfit.cause) is None:
        return InputError(misfit.what, where=place, fix=fix)
    inner = place if cause.where is None else f"{place}: {cause.where}"
    return InputError(cause.what, where=inner, fix=cause.fix or fix)


def _path(steps: tuple[int | str, ...]) -> str:
    """Return ``sites[3].rank`` for ("sites", 3, "rank")."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _what(details: ErrorDetails) -> str:
    if details["type"] == "missing":
        return "the field is missing"
    if details["type"] in _UNKNOWN:
        return "there is no such field"
    expected = details["msg"].replace("Input should be", "expected")
    return f"{expected}; found {reprlib.repr(details['input'])}"
