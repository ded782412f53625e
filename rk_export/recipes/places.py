"""YAML text as plain data, and the line and column of every value in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from rk_export.errors import InputError

Path = tuple[int | str, ...]
_DEEPEST = 64


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does: 1e-2 is one, 1:30 and 010 are no whole ones."""


# What a number is, by its tag, its form and what it begins with.
FLOAT = "tag:yaml.org,2002:float"
FLOAT_PATTERN = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"
)
FLOAT_STARTS = list("-+.0123456789")
_INT = "tag:yaml.org,2002:int"
_REPLACED = (FLOAT, _INT, "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(FLOAT, FLOAT_PATTERN, FLOAT_STARTS)


@dataclass
class Places:
    """Where each value of a file stands.

    Args:
        file: Its name, for messages.
        at: Line and column, from 1, of the key of each value, by the keys and indices that lead to it.
    """

    file: str
    at: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def of(self, path: Path) -> str:
        """Return ``file:line:column`` of a value, or of the nearest one around it."""
        while path and path not in self.at:
            path = path[:-1]
        line, column = self.at.get(path, (1, 1))
        return f"{self.file}:{line}:{column}"


def parsed(text: str, file: str) -> tuple[Any, Places]:
    """Return the data of a YAML text, and where they stand.

    Raises:
        InputError: The text is no YAML, a key stands twice or is no text, or an alias is used.
    """
    places = Places(file)
    try:
        node = yaml.compose(text, Loader=_Loader)
        return (None if node is None else _Builder(places).build(node, ())), places
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = file if mark is None else f"{file}:{mark.line + 1}:{mark.column + 1}"
        raise InputError(f"no YAML: {error.problem}", where=where, fix="correct the file") from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = f"{file}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise InputError(
            f"no YAML: the character U+{error.character:04X}", where=where, fix="drop it"
        ) from error
    except RecursionError as error:
        raise InputError("nested too deeply", where=file, fix="correct the file") from error


def scalar(text: str, where: str) -> Any:
    """Return what a value on the command line stands for: a number, a truth value, null, a list, or text.

    Raises:
        InputError: It is no YAML.
    """
    try:
        data, _ = parsed(text, where)
    except InputError as error:
        raise InputError(error.what, where=where, fix="correct the value") from error
    return data


class _Builder:
    """Makes data from nodes, and notes where they stand."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._seen: set[int] = set()

    def build(self, node: yaml.Node, path: Path) -> Any:
        mark = node.start_mark
        place = (mark.line + 1, mark.column + 1)
        if len(path) > _DEEPEST:
            raise self._refusal("nested too deeply", "correct the file", place)
        self._places.at.setdefault(path, place)
        if id(node) in self._seen:
            raise self._refusal("an alias", "write the value out", place)
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, place)

    def _scalar(self, node: yaml.Node, place: tuple[int, int]) -> Any:
        """Return a text, a number, a truth value or None; tags can ask for more, and for what cannot be read."""
        try:
            value = yaml.constructor.SafeConstructor().construct_object(node, deep=True)
            known = value is None or isinstance(value, (bool, int, float, str))
            str(value).encode()  # a lone surrogate is no text
        except (ValueError, KeyError):
            known = False
        if not known:
            raise self._refusal("neither text nor a number", "write one of them", place)
        return value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            place = (key.start_mark.line + 1, key.start_mark.column + 1)
            name = key.value
            if not isinstance(key, yaml.ScalarNode) or not isinstance(name, str):
                raise self._refusal("a key that is no name", "write a name", place)
            if name in data:
                raise self._refusal(f"{name!r} stands twice", "drop one of the two", place)
            self._places.at[(*path, name)] = place
            data[name] = self.build(value, (*path, name))
        return data

    def _refusal(self, what: str, fix: str, place: tuple[int, int]) -> InputError:
        return InputError(what, where=f"{self._places.file}:{place[0]}:{place[1]}", fix=fix)
