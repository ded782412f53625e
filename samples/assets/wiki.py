"""Plain prose from a MediaWiki dump: the text that perplexity is measured on and that calibration reads.

Of every article of some length the long paragraphs are kept. Articles alternate: the openings of every second
one form the evaluation text, the others, whole, the calibration text; no article is in both.
"""

from __future__ import annotations

import bz2
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rk_export import InputError

logger = logging.getLogger(__name__)

_MIN_PARAGRAPH = 250  # characters
_MIN_ARTICLE = 2000
_EVAL_ARTICLE = 5500
_MARKUP = [  # removed before parsing, in this order
    re.compile(r"<!--.*?-->", re.S),
    re.compile(r"<ref[^>]*/>"),
    re.compile(r"<ref[^>]*>.*?</ref>", re.S),
    re.compile(r"\{\|.*?\|\}", re.S),
]
_MEDIA = re.compile(r"\s*:?(file|image|category)\s*:", re.I)
_DROPPED_TAGS = frozenset(
    ["ref", "table", "gallery", "math", "code", "timeline", "imagemap", "syntaxhighlight", "pre"]
)
_SENTENCE_END = re.compile(r"""(\.|\."|\)|\?)$""")


def eval_and_calibration(dump: Path) -> tuple[str, str]:
    """Return the evaluation and the calibration text of a compressed MediaWiki dump.

    Raises:
        InputError: mwparserfromhell is not installed.
    """
    texts: tuple[list[str], list[str]] = ([], [])
    taken = 0
    for title, markup in _articles(dump):
        paragraphs = _paragraphs(markup)
        if sum(map(len, paragraphs)) < _MIN_ARTICLE:
            continue
        is_eval = taken % 2 == 0
        body = _opening(paragraphs) if is_eval else paragraphs
        texts[0 if is_eval else 1].append("\n\n".join([title, *body]))
        taken += 1
        if taken % 20 == 0:
            logger.info("wiki text: %d articles prepared", taken)
    evaluation, calibration = ("\n\n\n".join(articles) + "\n" for articles in texts)
    return evaluation, calibration


def _articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Yield title and wikitext of the articles, without redirects and pages about a single letter."""
    with bz2.open(dump) as stream:
        root = ElementTree.parse(stream).getroot()
    space = {"w": root.tag[1:].split("}")[0]}
    for page in root.iterfind("w:page", space):
        title = page.findtext("w:title", "", space)
        is_article = page.findtext("w:ns", "", space) == "0" and page.find("w:redirect", space) is None
        if is_article and len(title) > 1:
            yield title, page.findtext("w:revision/w:text", "", space)


def _paragraphs(markup: str) -> list[str]:
    """Return the long paragraphs of an article as plain text."""
    lines = (_tidy(line) for line in _plain(markup).split("\n"))
    return [
        line
        for line in lines
        if len(line) >= _MIN_PARAGRAPH and "|" not in line and _SENTENCE_END.search(line)
    ]


def _plain(markup: str) -> str:
    for pattern in _MARKUP:
        markup = pattern.sub("", markup)
    code = _parser().parse(markup)
    for node in code.filter_tags(matches=lambda node: str(node.tag).lower() in _DROPPED_TAGS):
        _remove(code, node)
    for node in code.filter_wikilinks(matches=lambda node: _MEDIA.match(str(node.title))):
        _remove(code, node)
    return str(code.strip_code())


def _remove(code: Any, node: Any) -> None:
    try:
        code.remove(node)
    except ValueError:  # went away together with the node around it
        return


def _tidy(line: str) -> str:
    """Collapse white space and mend the brackets that templates have left empty."""
    line = re.sub(r"\s+", " ", line).strip()
    line = re.sub(r"\(\s*[;,]\s*", "(", line)
    return re.sub(r" ?\(\s*\)", "", line)


def _opening(paragraphs: list[str]) -> list[str]:
    """Return whole paragraphs up to the one that passes the length of an evaluation article."""
    length = 0
    for count, paragraph in enumerate(paragraphs, start=1):
        length += len(paragraph)
        if length >= _EVAL_ARTICLE:
            return paragraphs[:count]
    return paragraphs


def _parser() -> Any:
    try:
        import mwparserfromhell
    except ImportError as error:
        fix = "pip install mwparserfromhell"
        raise InputError("preparing the Wikipedia text needs mwparserfromhell", fix=fix) from error
    return mwparserfromhell
