"""The harness of the measurements: rows are kept, never mixed, and every page in docs/results is what its rows say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from measure import harness
from measure.harness import Results, Row

from rk_export import InputError

DOCS = Path(__file__).parents[2] / "docs" / "results"
PAGES = {
    "basel": "papers.basel.report",
    "cap": "papers.cap.report",
    "engine": "measure.engine_speed",
    "encoders": "measure.encoders",
    "export": "measure.measure_export",
    "factorization": "measure.bench_factorization",
    "groupings": "measure.factorize_groupings",
    "int4_against_genai": "measure.bench_against_genai",
    "joint_rank": "papers.joint_rank.main",
    "mixtures": "measure.mixtures",
    "pareto": "measure.sweep",
    "pruning": "measure.prune_structures",
    "real_models": "measure.real_models",
    "sampling": "measure.bench_sampling",
    "scale": "measure.scale",
    "serving": "measure.serve_load",
    "serving_soak": "measure.serve_soak",
    "sparse_export": "measure.measure_sparse_export",
    "speculation": "measure.speculation",
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_the_script_says_of_the_rows(name: str) -> None:
    page = importlib.import_module(PAGES[name]).page(Results(DOCS, name))
    assert page == (DOCS / f"{name}.md").read_text(encoding="utf-8")


def rows(*keys: str) -> list[tuple[str, harness.Measure]]:
    def measured(key: str) -> Row:
        return {"value": float(len(key))}

    return [(key, lambda key=key: measured(key)) for key in keys]


def test_rows_are_measured_once_and_saved_one_by_one(tmp_path: Path) -> None:
    def interrupted() -> Row:
        raise KeyboardInterrupt

    first = Results(tmp_path / "new", "name", {"tokens": 5})
    with pytest.raises(KeyboardInterrupt):
        first.measure([*rows("a"), ("b", interrupted)])
    again = Results(tmp_path / "new", "name", {"tokens": 5})
    assert list(again.rows) == ["a"]
    assert again.measure([("a", interrupted), *rows("b@1", "c@2")], ["*@1"])
    assert json.loads(again.path.read_text(encoding="utf-8"))["rows"].keys() == {"a", "b@1"}
    assert list(again.ordered(["c", "b@1", "a"])) == ["b@1", "a"]


def test_no_row_starts_after_the_time_is_up(tmp_path: Path) -> None:
    results = Results(tmp_path, "name")
    assert not results.measure(rows("a"), until=0)
    assert not results.rows


def test_rows_of_another_protocol_are_not_mixed_in(tmp_path: Path) -> None:
    Results(tmp_path, "name", {"tokens": 5, "context": 2, "kinds": ("a", "b")}).save()
    assert Results(tmp_path, "name", {"tokens": 5, "kinds": ("a", "b")}).facts["context"] == 2
    with pytest.raises(InputError, match="measured with other context"):
        Results(tmp_path, "name", {"tokens": 5, "context": 3})


def test_tables_align_where_they_are_told_to() -> None:
    assert harness.table(["a", "b"], [[1, "x"]], " r") == "| a | b |\n| --- | ---: |\n| 1 | x |"
