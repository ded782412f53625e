"""The table of inputs is complete, within its bound, and still what happens."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from input_cases import CASES
from input_cases.case import Row, run_case
from input_cases.texts import SAMPLED
from longrope_models import SWITCH
from measure_inputs import RESULTS, faults, page

BY_NAME = {case.name: case for case in CASES}
# A refusal of files, one of an adapter, and one model that is read and compared.
CHEAP = ("fewer layers than the file", "IA3", "tied, another head stored")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "inputs.json").read_text(encoding="utf-8"))
    return found


def test_every_case_has_one_row(results: dict[str, Any]) -> None:
    assert len(BY_NAME) == len(CASES)
    assert [row["case"] for row in results["rows"]] == [case.name for case in CASES]


def test_every_row_is_as_expected(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        case = BY_NAME[row["case"]]
        assert faults(case, Row(**row)) == []
        assert (row["input"], row["command"]) == (case.given, case.command)
        assert row["message"] or row["outcome"] != "refused"


def test_longrope_is_continued_across_its_switch(results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if row["case"].startswith("LongRoPE")]
    assert rows
    assert all(len(SAMPLED) < SWITCH < len(SAMPLED) + row["tokens"] for row in rows)


def test_the_page_is_made_from_the_rows(results: dict[str, Any]) -> None:
    assert (RESULTS / "inputs.md").read_text(encoding="utf-8") == page(results)


@pytest.mark.whole
@pytest.mark.parametrize("name", CHEAP)
def test_a_case_still_ends_so(results: dict[str, Any], tmp_path: Path, name: str) -> None:
    expected = next(row for row in results["rows"] if row["case"] == name)
    row = run_case(BY_NAME[name], tmp_path)
    assert faults(BY_NAME[name], row) == []
    assert asdict(row) | {"error": None} == expected | {"error": None}
    assert (row.error is None) is (expected["error"] is None)


def test_an_outcome_and_an_error_that_are_not_expected_are_faults() -> None:
    case = BY_NAME["LoRA"]
    row = Row(case.name, case.given, case.command, "merged", 1e-6, None, "")
    assert faults(case, row) == []
    for changes in ({"outcome": "refused", "error": None}, {"error": 2e-4}, {"error": float("nan")}):
        assert len(faults(case, Row(**{**asdict(row), **changes}))) == 1
