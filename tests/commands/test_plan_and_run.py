"""A plan says what was decided, a run is this machine: neither plan nor bundle holds a path, a device or a cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SENTENCES, Cli, Ended

from rk_export import Plan, Recipe, TextFile
from rk_export.errors import InputError
from rk_export.options.calibration import CalibrationOptions
from rk_export.report.records import Report

pytestmark = pytest.mark.whole


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "private"
    folder.mkdir()
    path = folder / "mine.txt"
    path.write_text(" ".join(SENTENCES * 40), encoding="utf-8")
    return path


def done(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    return ended


def calibrated(text: Path) -> tuple[object, ...]:
    return ("--recipe", "int4", "--set", f"calibration.text={text}", "--set", "calibration.tokens=512")


def test_no_file_of_a_bundle_tells_where_anything_lay(
    cli: Cli, llama: Path, tmp_path: Path, text: Path
) -> None:
    out = tmp_path / "out"
    done(cli("compress", llama, "-o", out, *calibrated(text)))
    for path in out.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name
            assert str(llama.parent).encode() not in path.read_bytes(), path.name
    plan = json.loads((out / "plan.json").read_text())
    known = TextFile.of(text)
    assert plan["recipe"]["calibration"]["text"] == {"name": "mine.txt", "sha256": known.sha256}
    assert "device" not in plan["recipe"]
    assert f"calibration.text={text.name}" in Report.load(out / "report.json").command


def test_a_plan_goes_with_every_option_of_the_machine(cli: Cli, llama: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    done(cli("plan", llama, "-o", plan, "--recipe", "joint-rank"))
    machine = ("--device", "cpu", "--threads", 1)
    done(cli("compress", llama, "-o", tmp_path / "out", "--plan", plan, *machine))
    done(cli("analyze", llama, "-o", tmp_path / "spectra", "--plan", plan, "--device", "cpu"))
    refused = cli("compress", llama, "-o", tmp_path / "other", "--plan", plan, "--recipe", "int8")
    assert refused.code == 2
    assert "a plan already holds its recipe" in refused.err


def test_a_plan_knows_its_text_by_content(cli: Cli, llama: Path, tmp_path: Path, text: Path) -> None:
    plan, moved = tmp_path / "plan.json", tmp_path / "moved.txt"
    done(cli("plan", llama, "-o", plan, *calibrated(text)))
    text.rename(moved)
    refused = cli("compress", llama, "-o", tmp_path / "out", "--plan", plan)
    assert refused.code == 2
    assert "the text mine.txt" in refused.err
    assert "--calibration-text FILE" in refused.err
    done(cli("compress", llama, "-o", tmp_path / "out", "--plan", plan, "--calibration-text", moved))
    assert Plan.load(tmp_path / "out" / "plan.json") == Plan.load(plan)


def test_another_text_is_not_taken_for_it(cli: Cli, llama: Path, tmp_path: Path, text: Path) -> None:
    plan = tmp_path / "plan.json"
    done(cli("plan", llama, "-o", plan, *calibrated(text)))
    text.write_text("Something else.", encoding="utf-8")
    assert (
        cli("compress", llama, "-o", tmp_path / "out", "--plan", plan, "--calibration-text", text).code == 2
    )


def test_a_bundle_is_verified_after_its_text_has_moved(
    cli: Cli, llama: Path, tmp_path: Path, text: Path
) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved.txt"
    done(cli("compress", llama, "-o", out, *calibrated(text)))
    text.rename(moved)
    tiers = json.loads(done(cli("verify", out, "--against", llama, "--json")).out)
    measured = {tier["tier"] for tier in tiers if tier["max_error"] is not None}
    unknown = {tier["tier"]: tier["note"] for tier in tiers if tier["max_error"] is None}
    assert {"0", "d", "e", "f", "g"} <= measured
    assert {"a", "b", "c"} <= unknown.keys()
    assert "the calibration text mine.txt is not at hand" in unknown["c"]
    again = json.loads(
        done(cli("verify", out, "--against", llama, "--calibration-text", moved, "--json")).out
    )
    assert {"a", "b", "c"} <= {tier["tier"] for tier in again if tier["max_error"] is not None}


def test_texts_are_equal_by_name_and_content(text: Path) -> None:
    known = TextFile.of(text)
    assert known == replace(known, path=None)
    options = Recipe(calibration=CalibrationOptions(replace(known, path=None)))
    assert options.missing_text == known
    assert options.with_texts((text,)).missing_text is None
    with pytest.raises(InputError, match="sha256"):
        replace(known, path=None).place()
