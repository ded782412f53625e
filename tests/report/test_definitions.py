"""The table of definitions: complete, unique, short."""

from __future__ import annotations

import pytest
from sample_report import full_report

from rk_export.report.definitions import DEFINITIONS, definition_of, definitions_of, row_label
from rk_export.report.records import TIERS
from rk_export.report.sections import sections
from rk_export.report.table import Column, Table

# What says by itself what it is.
PLAIN = {"what", "compared", "note", "why", "stage", "software", "version"}


def test_terms_and_labels_mean_one_thing_each() -> None:
    labels = [label for one in DEFINITIONS for label in (one.term, *one.labels)]
    assert len(set(labels)) == len(labels)
    assert len({one.anchor for one in DEFINITIONS}) == len(DEFINITIONS)


def test_every_heading_of_a_report_is_defined_or_plain() -> None:
    tables = [section.table for section in sections(full_report()) if section.table is not None]
    titles = {column.title for table in tables for column in table.columns}
    assert {title for title in titles if definition_of(title) is None} == PLAIN


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_is_defined(tier: str) -> None:
    assert definition_of(f"tier {tier}") is not None


def test_definitions_are_short_sentences() -> None:
    for one in DEFINITIONS:
        assert one.meaning.endswith(".")
        assert all(len(sentence.split()) <= 32 for sentence in one.meaning.split(". "))


@pytest.mark.parametrize(
    ("label", "term"),
    [
        ("perplexity on prose.txt", "perplexity"),
        ("acc on trivia", "accuracy"),
        ("difference to dense", "difference"),
        ("Rank", None),
        ("", None),
    ],
)
def test_what_a_row_adds_does_not_hide_its_meaning(label: str, term: str | None) -> None:
    found = definition_of(label)
    assert (None if found is None else found.term) == term


def test_a_page_gets_what_it_uses_in_the_order_of_the_list() -> None:
    table = Table((Column("tier", "name"), Column("rank")), (("c", "4"), ("f", "8")))
    assert [row_label(table, row) for row in table.rows] == ["tier c", "tier f"]
    found = [one.term for one in definitions_of([table], ["bits", "nobody knows"])]
    assert found == ["tier", "tier c", "tier f", "rank", "bits"]
