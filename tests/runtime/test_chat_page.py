"""The chat page as a file: it loads nothing, runs under a strict policy, and inserts text as text only."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "runtime" / "server" / "static" / "index.html"
CONTROLS = {"input", "select", "textarea"}


class Elements(HTMLParser):
    """Collects the tags of a page with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def text() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tags(text: str) -> list[tuple[str, dict[str, str | None]]]:
    return Elements(text).tags


def test_one_style_and_one_script_and_nothing_from_elsewhere(
    text: str, tags: list[tuple[str, dict[str, str | None]]]
) -> None:
    names = [tag for tag, _ in tags]
    assert (names.count("style"), names.count("script")) == (1, 1)
    addresses = [
        value for _, found in tags for name, value in found.items() if name in ("src", "href", "action")
    ]
    assert addresses == ["data:,"]  # the icon, which is empty
    assert re.findall(r"https?:|@import|url\(|import\(", text) == []


def test_a_policy_of_hashes_allows_all_of_it(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    """Hashes allow the two elements, but no attribute with a style or a handler."""
    attributes = {name for _, found in tags for name in found}
    assert not {name for name in attributes if name == "style" or name.startswith("on")}
    assert all(not found for tag, found in tags if tag in ("style", "script"))


def test_text_is_inserted_as_text(text: str) -> None:
    ways = (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
    )
    assert [way for way in ways if way in text] == []


def test_nothing_outlives_the_tab(text: str) -> None:
    assert re.findall(r"localStorage|indexedDB|document\.cookie|caches\.", text) == []


def test_every_control_has_a_label(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    labelled = {found.get("for") for tag, found in tags if tag == "label"}
    assert {found["id"] for tag, found in tags if tag in CONTROLS} == labelled
