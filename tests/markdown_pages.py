"""Markdown pages as tests see them: links, headings and sentences, each with the line it stands on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
FEWEST_WORDS = 3  # of a sentence; "see below" and entries of lists are none

_FORMULA = re.compile(r"\$\$.+?\$\$|(?<![\\$\w])\$(?!\s)[^$\n]+(?:\n[^$\n]+)?(?<!\s)\$(?!\w)", re.DOTALL)
_FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`]*`")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*(?=\s+\S)")
_ABBREVIATION = re.compile(r"(?:\be\.g|\bi\.e|\betc|\bvs|\bcf|\bal)\.[\"')\]]*$")
_HTML_LINK = re.compile(r"(?:href|src)=\"([^\"]+)\"")
_WORD = re.compile(r"\w[\w'’.-]*")


@dataclass(frozen=True)
class Sentence:
    """A sentence of prose.

    Attributes:
        path: the page.
        line: the line that it begins on, from 1.
        text: the sentence in one line, code in backticks.
    """

    path: Path
    line: int
    text: str

    @property
    def words(self) -> int:
        """The number of words; a piece of code or a formula is one."""
        return len(_WORD.findall(_CODE.sub("code", self.text)))


def pages() -> list[Path]:
    """Return every page for readers: README and changelog, and all of ``docs``."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def tokens(path: Path) -> list[Token]:
    """Return the page's tokens; each formula is a piece of code, so that no character of it is Markdown."""
    return _parsed(path.read_text(encoding="utf-8"))


@cache
def _parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(_outside_code(text))


def _outside_code(text: str) -> str:
    """Replace the formulas outside code blocks, line for line."""
    parts: list[str] = []
    end = 0
    for fence in _FENCE.finditer(text):
        parts += [_without_formulas(text[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, _without_formulas(text[end:])])


def _without_formulas(text: str) -> str:
    return _FORMULA.sub(lambda found: "`formula`" + "\n" * found.group().count("\n"), text)


def links(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and target of every link and image of a page, those in HTML too."""
    for token in tokens(path):
        line = (token.map or [0])[0] + 1
        for part in [token, *(token.children or [])]:
            targets = [part.attrGet("href"), part.attrGet("src")]
            if part.type.startswith("html_"):
                targets += _HTML_LINK.findall(part.content)
            yield from ((line, str(target)) for target in targets if target)


def anchors(path: Path) -> set[str]:
    """Return what may stand after ``#`` in a link to the page, as GitHub and the site name headings."""
    seen: Counter[str] = Counter()
    names: set[str] = set()
    for opening, inline in pairwise(tokens(path)):
        if opening.type == "heading_open":
            name = re.sub(r"[^\w\- ]", "", _plain(inline).lower()).replace(" ", "-")
            names.add(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
    return names


def _plain(inline: Token) -> str:
    return "".join(child.content for child in inline.children or [])


def sentences(path: Path) -> Iterator[Sentence]:
    """Yield the sentences of a page: of paragraphs and lists, not of headings, tables and code."""
    inside: list[str] = []
    for token in tokens(path):
        if token.nesting == 1:
            inside.append(token.type)
        elif token.nesting == -1:
            inside.pop()
        elif token.type == "inline" and not {"heading_open", "table_open"} & set(inside):
            yield from _sentences_of(path, token)


def _sentences_of(path: Path, inline: Token) -> Iterator[Sentence]:
    text = "".join(_shown(child) for child in inline.children or [])
    line = (inline.map or [0])[0] + 1
    for part in _split(text):
        sentence = Sentence(path, line + len(part) - len(part.lstrip("\n")), " ".join(part.split()))
        line += part.count("\n")
        if sentence.words >= FEWEST_WORDS:
            yield sentence


def _shown(token: Token) -> str:
    if token.type in ("softbreak", "hardbreak"):
        return "\n"
    return (
        f"`{token.content}`" if token.type == "code_inline" else token.content if token.type == "text" else ""
    )


def _split(text: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(_CODE.sub(lambda code: "c" * len(code.group()), text)):
        if not _ABBREVIATION.search(text[start : end.end()]):
            yield text[start : end.end()]
            start = end.end()
    yield text[start:]
