"""The page of what becomes of every type of transformers: made from its rows, and no bundle in it is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from measure_unknown_families import RESULTS, TOLERANCE, page


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "unknown_families.json").read_text(encoding="utf-8"))
    return found


def test_the_page_is_made_from_the_rows(results: dict[str, Any]) -> None:
    assert (RESULTS / "unknown_families.md").read_text(encoding="utf-8") == page(results)


def test_every_type_is_read_rightly_or_refused_with_a_reason(results: dict[str, Any]) -> None:
    assert len(results["rows"]) > 200
    for row in results["rows"]:
        assert row["outcome"] in ("known", "text model", "taken", "refused")
        assert row["message"] if row["outcome"] == "refused" else row["family"]
        assert row["outcome"] != "taken" or row["error"] <= TOLERANCE
