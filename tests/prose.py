"""Check that the pages read easily: the length of their sentences, and turns of phrase that slow a reader down.

python tests/prose.py                every page; status 1 if one is hard to read
python tests/prose.py docs/*.md      these pages, with their worst sentences

Code blocks, tables, headings and formulas are left out, and so is the changelog: its entries are no sentences.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path

from markdown_pages import ROOT, Sentence, pages, sentences

MEDIAN = 18  # words; the median sentence is shorter
LONG = 32  # words; a longer sentence is hard to read
SHARE = 0.05  # of the sentences of a page may be long
WORST = 3  # sentences are shown of each page that fails

# A pattern, and how to say it. Each was common here, and each makes a reader look twice.
PHRASES = (
    (r"^What\b[^?]*$", 'a clause as subject: name the thing ("the cost of …" for "what … costs")'),
    (r"\bof (?:yours|ours)\b", 'say "your …" or "our …"'),
    (r"\b(?:is|are|was|were) asked for\b", 'say who asks: "you ask for …", or "requested"'),
    (r"\b(?:held|hold|holds) (?:against|to)\b", 'say "compared with" or "checked against"'),
    (r"\bat hand\b", 'say "available", or which one'),
    (r"\b(?:need|needs) not\b(?! be\b)", 'say "does not need to"'),
    (r"\bbut for\b|\bsave for\b", 'say "except"'),
    (r"\bthe (?:former|latter)\b", "name it"),
    (r"\ball else\b", 'say "everything else"'),
)


def main() -> int:
    """Print the pages that are hard to read, and return the exit status."""
    parser = argparse.ArgumentParser(description="Check the length of sentences and turns of phrase.")
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files (default: every page)")
    chosen = parser.parse_args().pages
    checked = [path.resolve() for path in chosen] or default_pages()
    complaints = [text for path in checked for text in page_complaints(list(sentences(path)))]
    everything = [sentence for path in checked for sentence in sentences(path)]
    complaints += length_complaints("all pages", everything)
    print("\n".join(complaints))
    print(f"{len(checked)} pages: {summary(everything)}")
    return 1 if complaints else 0


def default_pages() -> list[Path]:
    return [path for path in pages() if path.name != "CHANGELOG.md"]


def summary(found: list[Sentence]) -> str:
    """Return the figures of some sentences in words."""
    counts = [sentence.words for sentence in found]
    long = sum(count >= LONG for count in counts) / max(len(counts), 1)
    median = statistics.median(counts) if counts else 0
    return f"{len(counts)} sentences, median {median:g} words, {long:.1%} of {LONG} words or more"


def page_complaints(found: list[Sentence]) -> list[str]:
    """Return a line for each turn of phrase, and the worst sentences of a page whose sentences are too long."""
    lines = [
        f"{_place(sentence)}: {advice}: {sentence.text}"
        for sentence in found
        for pattern, advice in PHRASES
        if re.search(pattern, sentence.text)
    ]
    name = str(_shown(found[0].path)) if found else ""
    return [*length_complaints(name, found), *lines]


def length_complaints(name: str, found: list[Sentence]) -> list[str]:
    """Return the figures and the worst sentences where the median or the share of long ones is too high."""
    counts = [sentence.words for sentence in found]
    long = sum(count >= LONG for count in counts)
    if not counts or (statistics.median(counts) < MEDIAN and long <= SHARE * len(counts)):
        return []
    worst = sorted(found, key=lambda sentence: -sentence.words)[:WORST]
    shown = [f"  {_place(sentence)}: {sentence.words} words: {sentence.text}" for sentence in worst]
    return [f"{name}: {summary(found)}; wanted: a median below {MEDIAN}, at most {SHARE:.0%} long", *shown]


def _place(sentence: Sentence) -> str:
    return f"{_shown(sentence.path)}:{sentence.line}"


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main())
