"""The check of the prose finds what it says, on the line where it is; and the pages pass it."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_pages import anchors, links, sentences
from prose import default_pages, length_complaints, page_complaints

LONG = "This sentence " + "goes on and on " * 8 + "to its end."


def _page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def _texts(folder: Path, text: str) -> list[tuple[int, str]]:
    return [(sentence.line, sentence.text) for sentence in sentences(_page(folder, text))]


def test_sentences_have_their_lines(tmp_path: Path) -> None:
    text = "# A heading\n\nThe first one ends\nhere. The second one\nends there, e.g. here.\n\n- One entry of it.\n"
    assert _texts(tmp_path, text) == [
        (3, "The first one ends here."),
        (4, "The second one ends there, e.g. here."),
        (7, "One entry of it."),
    ]


@pytest.mark.parametrize(
    "left_out",
    [
        "```python\nprint('one. two. three.')\n```",
        "| some words | in a table |\n| --- | --- |\n| more words | in a row |",
        "$$\nx = y \\text{ with many words in it}\n$$",
    ],
    ids=["code", "table", "formula"],
)
def test_what_is_no_prose_is_left_out(tmp_path: Path, left_out: str) -> None:
    found = _texts(tmp_path, f"These are four words.\n\n{left_out}\n\nThe page ends here.\n")
    line = 5 + left_out.count("\n")
    assert found == [(1, "These are four words."), (line, "The page ends here.")]


def test_code_and_formulas_are_one_word(tmp_path: Path) -> None:
    page = _page(tmp_path, "Call `rk-export plan MODEL. Then` with $x_i = a * b * c$ at once.\n")
    (sentence,) = sentences(page)
    assert sentence.words == 6


def test_long_sentences_fail(tmp_path: Path) -> None:
    short = "This sentence has six words only. " * 19
    assert length_complaints("page", list(sentences(_page(tmp_path, short + LONG)))) == []
    figures, worst, *_ = length_complaints("page", list(sentences(_page(tmp_path, short + f"{LONG} {LONG}"))))
    assert "9.5% of 32 words or more" in figures
    assert "page.md:1: 37 words" in worst


def test_a_turn_of_phrase_fails_with_advice(tmp_path: Path) -> None:
    found = list(sentences(_page(tmp_path, "\nWhat is kept is stored.\nWhat does it cost?\n")))
    (complaint,) = page_complaints(found)
    assert "page.md:2: a clause as subject" in complaint


def test_links_and_anchors(tmp_path: Path) -> None:
    page = _page(
        tmp_path, '# The `a` & b\n\n## Twice\n\n## Twice\n\n[x](a.md#b) `[y](z)`\n<img src="c.svg">\n'
    )
    assert anchors(page) == {"the-a--b", "twice", "twice-1"}
    assert [target for _, target in links(page)] == ["a.md#b", "c.svg"]


@pytest.mark.parametrize("path", default_pages(), ids=lambda path: path.name)
def test_pages_read_easily(path: Path) -> None:
    assert page_complaints(list(sentences(path))) == []
