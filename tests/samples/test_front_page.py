"""The front page shows figures that were measured, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

from measure.front_page import BLOCK, README, page, with_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
FIGURES = json.loads((RESULTS / "front_page.json").read_text(encoding="utf-8"))


def test_the_table_is_that_of_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert with_table(text, FIGURES) == text
    assert (RESULTS / "front_page.md").read_text(encoding="utf-8") == page(FIGURES)


def test_no_other_figure_is_on_the_page() -> None:
    """Outside the table and code there are versions and settings, but nothing that somebody would have to measure."""
    text = BLOCK.sub("", README.read_text(encoding="utf-8"))
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|<[^>]*>", "", text, flags=re.DOTALL)
    assert re.findall(r"\d+(?:\.\d+)?\s?(?:%|MB|GB|ms|tokens|times|x\b|s\b)", text) == []
    assert re.findall(r"\b\d+\.\d+\b", text) == ["3.11", "2.0"]  # Python, the licence


def test_no_cell_is_long() -> None:
    for line in README.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            assert all(len(cell.split()) <= 20 for cell in line.split("|")), line
