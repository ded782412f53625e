"""The report's JSON: exact both ways, and clear about what it refuses."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from sample_report import full_report

from rk_export.errors import InputError
from rk_export.json_codec import from_json, to_json
from rk_export.report import records as report_module
from rk_export.report.records import (
    Finding,
    Fusion,
    LayerError,
    Outcome,
    ParityTier,
    Report,
    SizeSummary,
    Spectrum,
)

RECORDS: dict[type[Any], Any] = {
    Finding: full_report().findings[1],
    Fusion: full_report().fusions[1],
    ParityTier: full_report().parity[2],
    LayerError: full_report().layer_errors[0],
    SizeSummary: SizeSummary(4, 3, 16, 5),
    Spectrum: full_report().spectra[0],
    Report: full_report(),
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=lambda record: type(record).__name__)
def test_json_round_trip_is_exact(record: Any) -> None:
    text = json.dumps(to_json(record), allow_nan=False)
    assert from_json(type(record), json.loads(text), "record") == record


def test_every_field_of_the_sample_is_filled() -> None:
    empty = Report("", "", "")
    for field in dataclasses.fields(Report):
        assert getattr(full_report(), field.name) != getattr(empty, field.name), field.name


def test_save_and_load(tmp_path: Path) -> None:
    full_report().save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == full_report()


def test_saved_file_has_one_finding_a_line(tmp_path: Path) -> None:
    full_report().save(tmp_path / "report.json")
    lines = (tmp_path / "report.json").read_text(encoding="utf-8").splitlines()
    assert sum('"outcome"' in line for line in lines) == len(full_report().findings)


def test_infinite_and_undefined_numbers_survive_as_standard_json(tmp_path: Path) -> None:
    report = Report("m", "llama", "", timings={"plan": math.inf, "verify": math.nan})
    report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    loaded = Report.load(tmp_path / "report.json")
    assert loaded.timings["plan"] == math.inf
    assert math.isnan(loaded.timings["verify"])


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(
        InputError, match=r"version .* is not supported; this rk-export reads version 1"
    ) as info:
        Report.from_json({**full_report().to_json(), "version": version})
    assert info.value.fix is not None


@pytest.mark.parametrize("data", [[], {}, {"format": "something else", "version": 1}])
def test_another_format_is_refused(data: Any) -> None:
    with pytest.raises(InputError, match="not a report of rk-export"):
        Report.from_json(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("\xff\xfe", "not valid JSON"), (None, "cannot be read")],
)
def test_unreadable_files_are_refused_by_name(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=message) as info:
        Report.load(path)
    assert info.value.where == str(path)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"model": 3}, "report: model"),
        ({"model": None}, "report: model"),
        ({"timings": {"load": "soon"}}, "report: timings.load"),
        ({"timings": {"load": True}}, "report: timings.load"),
        ({"findings": {}}, "report: findings"),
        ({"fusions": [{"pattern": "p", "planned": 1.5, "found": 1}]}, "report: fusions[0].planned"),
        ({"fusions": [{"pattern": "p", "planned": 1}]}, "report: fusions[0].found"),
        ({"fusions": ["p"]}, "report: fusions[0]"),
        ({"findings": [{"target": "t", "outcome": "lost"}]}, "report: findings[0].outcome"),
        ({"findings": [{"target": "t", "outcome": "skipped"}]}, "report: findings[0]"),
        ({"parity": [{"tier": "z", "name": "n", "max_error": 0, "scale": 1}]}, "report: parity[0]"),
        ({"surprise": 1}, "report: surprise"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change: dict[str, Any], place: str) -> None:
    with pytest.raises(InputError) as info:
        Report.from_json({**full_report().to_json(), **change})
    assert info.value.where == place


def test_a_missing_field_is_named() -> None:
    data = full_report().to_json()
    del data["model_type"]
    with pytest.raises(InputError, match="report: model_type: the field is missing"):
        Report.from_json(data)


@pytest.mark.parametrize("outcome", [Outcome.SKIPPED, Outcome.REFUSED])
def test_what_was_not_applied_needs_a_reason(outcome: Outcome) -> None:
    with pytest.raises(ValueError, match="needs a reason"):
        Finding("layers.0.self_attn.qk", outcome)


@pytest.mark.parametrize("tier", ["", "z", "ab"])
def test_unknown_parity_tiers_are_refused(tier: str) -> None:
    with pytest.raises(ValueError, match="parity tier"):
        ParityTier(tier, "name", 0.0, 1.0)


def test_relative_error_needs_a_scale() -> None:
    assert ParityTier("c", "name", 1.0, 4.0).relative_error == 0.25
    assert ParityTier("c", "name", 1.0, 0.0).relative_error is None


def test_report_is_a_leaf() -> None:
    tree = ast.parse(Path(report_module.__file__).read_text(encoding="utf-8"))
    imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {module for module in imports if module and module.startswith("rk_export")}
    assert ours == {"rk_export.errors", "rk_export.json_codec"}
