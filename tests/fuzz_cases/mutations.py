"""Damage to valid files: values, structure and bytes, all drawn from one generator so that a case can be repeated."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

Draw = random.Random
# Where a bracket or a bomb of this many stands, a reader without bounds needs gigabytes or a stack without an end.
MANY = (300, 2_000, 40_000)
NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 7, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 40, 1 << 63, (1 << 63) - 1, 1 << 64),
    *(
        -(1 << 63),
        10**30,
        10**4000,
        0.0,
        -0.5,
        0.3,
        1.5,
        1e300,
        1e-320,
        float("inf"),
        float("-inf"),
        float("nan"),
    ),
)
WORDS = (
    "",
    " ",
    "x",
    "\0",
    "\ud800",
    "é" * 50,
    "a" * 70_000,
    "%s%n",
    "{0}",
    "(" * 30,
    "(a+)+$",
    "[" * 9,
    "../x",
    "./.",
)
WORDS += (
    "auto",
    "default",
    "linear",
    "yarn",
    "llama3",
    "longrope",
    "dynamic",
    "gptq",
    "awq",
    "fp8",
    "float16",
    "F32",
)


class Hostile:
    """What is put in the place of a valid value.

    Args:
        outside: Files that nothing may open.
    """

    def __init__(self, outside: Sequence[str]) -> None:
        self.paths = (
            *outside,
            "/dev/zero",
            "/proc/self/environ",
            "~/.ssh/id_rsa",
            "//x/y",
            "C:\\x",
            "a\\..\\b",
        )

    def scalar(self, draw: Draw) -> Any:
        kind = draw.random()
        if kind < 0.4:
            return draw.choice(NUMBERS)
        if kind < 0.6:
            return draw.choice(WORDS)
        return draw.choice(self.paths) if kind < 0.8 else draw.choice((None, True, False))

    def value(self, draw: Draw) -> Any:
        kind = draw.random()
        if kind < 0.7:
            return self.scalar(draw)
        if kind < 0.8:
            return [self.scalar(draw) for _ in range(draw.randrange(4))]
        if kind < 0.9:
            return {str(self.scalar(draw))[:99]: self.scalar(draw) for _ in range(draw.randrange(4))}
        if kind < 0.95:
            return nested(draw.choice((5, 60, 70, 300)), draw.random() < 0.5)
        return [draw.choice(({}, [], 0, "x"))] * draw.choice(MANY)


def nested(depth: int, as_objects: bool) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"x": value} if as_objects else [value]
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and the key of every value in a JSON document."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        for key in (
            list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        ):
            yield node, key
            waiting.append(node[key])


def damaged_json(document: Any, hostile: Hostile, draw: Draw, more: Sequence[str] = ()) -> bytes:
    """Return a JSON document with one to four of its values changed, or with its bytes damaged.

    Args:
        document: A valid one; it is not changed.
        hostile: What is put in.
        draw: The generator of the case.
        more: Names that readers look for, which the document need not have.
    """
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        document = _changed(document, hostile, draw, more)
    data = _dumped(document, draw)
    return damaged_bytes(data, draw) if draw.random() < 0.15 else data


def _dumped(document: Any, draw: Draw) -> bytes:
    try:
        return json.dumps(document, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):  # an integer of more digits than Python writes
        return b"[" * 5000


def _changed(document: Any, hostile: Hostile, draw: Draw, more: Sequence[str]) -> Any:
    every = list(places(document))
    if not every or draw.random() < 0.02:
        return hostile.value(draw)
    if draw.random() < 0.35:
        return _nudged(document, every, draw)
    node, key = draw.choice(every)
    kind = draw.random()
    if kind < 0.5:
        node[key] = hostile.value(draw)
    elif kind < 0.62:
        del node[key]
    elif kind < 0.72:
        other, place = draw.choice(every)
        if place in other if isinstance(other, dict) else place < len(other):
            node[key] = copy.deepcopy(other[place]) if other is not node else hostile.value(draw)
    elif kind < 0.82 and isinstance(node, dict):
        node[draw.choice(WORDS) if draw.random() < 0.5 else str(key) + "x"] = node.pop(key)
    elif kind < 0.94 and isinstance(node, dict) and more:
        node[draw.choice(more)] = hostile.value(draw)
    elif isinstance(node[key], int) and not isinstance(node[key], bool):
        node[key] += draw.choice((-1, 1, 8, -node[key] * 2, 1 << 20))
    elif isinstance(node, list):
        node.extend(copy.deepcopy(node[key]) for _ in range(draw.choice((1, 3, 200))))
    else:
        node[key] = hostile.value(draw)
    return document


def _nudged(document: Any, every: Sequence[tuple[Any, Any]], draw: Draw) -> Any:
    """Change a value into another one of its type, which readers take longer to refuse."""
    node, key = draw.choice(every)
    value = node[key]
    if isinstance(value, bool):
        node[key] = not value
    elif isinstance(value, (int, float)) and draw.random() < 0.7:
        node[key] = draw.choice(
            (value + 1, value - 1, value * 2, -value, value * 1000, value + 64, value // 2)
        )
    else:
        node[key] = copy.deepcopy(
            draw.choice([other[place] for other, place in every if type(other[place]) is type(value)])
        )
    return document


_PIECES = (
    b"",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\u",
    b"1e9",
    b"NaN",
)
_PIECES += tuple(mark * count for mark in (b"[", b'{"a":', b" ", b"9", b'"') for count in MANY)


def damaged_bytes(data: bytes, draw: Draw) -> bytes:
    """Return bytes that were cut, turned, doubled, or had something put in."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(len(data) + 1)
        end = min(len(data), place + draw.choice((0, 1, 2, 8, 64)))
        kind = draw.randrange(5)
        if kind == 0:
            data = data[:place]
        elif kind == 1 and place < len(data):
            data = data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]
        elif kind == 2:
            data = data[:place] + data[place:end] * 2 + data[end:]
        elif kind == 3:
            data = data[:place] + draw.choice(_PIECES) + data[end:]
        else:
            data = data[:place] + data[end:]
    return data


INTEGERS = (
    0,
    1,
    2,
    3,
    7,
    255,
    1 << 15,
    (1 << 16) - 1,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 33,
    1 << 40,
)
INTEGERS += (100_000_000, 100_000_001, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def damaged_binary(data: bytes, places_of: Sequence[int], draw: Draw) -> bytes:
    """Return a binary file with counts and lengths changed where a header has them, or with its bytes damaged.

    Args:
        data: A valid one.
        places_of: Where its header has numbers of 4 or 8 bytes.
        draw: The generator of the case.
    """
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if draw.random() < 0.75 and places_of:
            place, size = draw.choice(places_of), draw.choice((4, 8))
            found = int.from_bytes(changed[place : place + size], "little")
            value = draw.choice((*INTEGERS, found + 1, max(found - 1, 0), found * 2, found + 32))
            changed[place : place + size] = struct.pack("<Q", value % (1 << 64))[:size]
        elif changed:
            changed[draw.randrange(min(len(changed), 4096))] = draw.randrange(256)
    result = bytes(changed)
    if draw.random() < 0.1:
        result = result[: draw.randrange(len(result) + 1)]
    return damaged_bytes(result, draw) if draw.random() < 0.1 else result


_YAML_VALUES = (
    "&a [*a, *a]",
    "*a",
    "!!python/object/apply:os.system ['touch x']",
    "!!binary aGk=",
    "!!set {a, b}",
    "<<: *a",
)
_YAML_VALUES += (
    "1e400",
    "0x1F",
    "010",
    ".inf",
    ".nan",
    "~",
    "yes",
    "[" * 500,
    "{a: " * 300,
    "? [a]",
    "|",
    ">-",
    "'",
    '"',
    "\t",
    "- ",
)
_YAML_VALUES += (
    "2001-01-01",
    "!!float x",
    "!!int 9" + "9" * 5000,
    "99999999999999999999999",
    "-1",
    "0",
    "0.0",
    "\x00",
    "\x85",
    "%YAML 9",
    "---",
    "...",
)
_YAML_VALUES += (
    "&a [x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: [*c,*c,*c,*c]",
    "a, " * 3000,
    "- 1\n" * 3000,
)


def _as_yaml(hostile: Hostile, draw: Draw) -> str:
    try:
        return json.dumps(hostile.value(draw))
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        return "9" * 5000


def damaged_yaml(text: str, hostile: Hostile, draw: Draw) -> bytes:
    """Return a YAML text with values, lines or bytes changed."""
    lines = text.split("\n")
    for _ in range(draw.choice((1, 1, 2, 3))):
        number = draw.randrange(len(lines))
        line = lines[number]
        kind = draw.random()
        if kind < 0.5 and ":" in line:
            value = draw.choice(_YAML_VALUES) if draw.random() < 0.5 else _as_yaml(hostile, draw)
            lines[number] = f"{line[: line.index(':') + 1]} {value}"
        elif kind < 0.6:
            lines[number] = draw.choice(_YAML_VALUES)
        elif kind < 0.7:
            lines.insert(number, lines[draw.randrange(len(lines))])
        elif kind < 0.8:
            lines.pop(number)
            lines = lines or [""]
        elif kind < 0.9:
            lines[number] = " " * draw.randrange(6) + line.lstrip()
        else:
            other = draw.randrange(len(lines))
            lines[number], lines[other] = lines[other], lines[number]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return damaged_bytes(data, draw) if draw.random() < 0.2 else data
