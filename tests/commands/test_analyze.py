"""`analyze` marks the ranks that `plan` chooses from the same options, or those of a plan file."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cli

from rk_export.plan import Plan
from rk_export.report.records import Report

pytestmark = pytest.mark.whole

FLOATS = ("--recipe", "floats")


def settings(*texts: str) -> tuple[str, ...]:
    return tuple(word for text in (*texts, "calibration.tokens=512") for word in ("--set", text))


@pytest.mark.parametrize(
    "options",
    [
        settings("factorize.groups=[qk, gate_up]", "factorize.keep=0.5", "factorize.rank_multiple=1"),
        settings("factorize.keep=0.5", "factorize.allocation=effective-rank", "factorize.rank_multiple=1"),
        ("--keep", 0.6, *settings("factorize.rank_multiple=1")),
        settings("factorize.groups=[q, down]", "factorize.energy=0.5", "factorize.rank_multiple=1"),
    ],
    ids=["uniform", "by spectra", "budget", "energy"],
)
def test_the_ranks_are_those_of_the_plan(
    cli: Cli, llama: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    plan = tmp_path / "plan.json"
    assert cli("plan", llama, "-o", plan, *FLOATS, *options).code == 0
    wanted = {site.site: site.rank for site in Plan.load(plan).sites if site.rank}
    for name, asked in (("by options", (*FLOATS, *options)), ("by plan", ("--plan", plan))):
        ended = cli("analyze", llama, "-o", tmp_path / name, *asked)
        assert ended.code == 0, ended.err
        drawn = Report.load(tmp_path / name / "report.json").spectra
        assert {item.target: item.chosen_rank for item in drawn if item.chosen_rank} == wanted, name
    assert wanted


def test_without_ranks_the_default_groups_are_drawn(cli: Cli, llama: Path, tmp_path: Path) -> None:
    assert cli("analyze", llama, "-o", tmp_path / "out", *FLOATS).code == 0
    drawn = Report.load(tmp_path / "out" / "report.json").spectra
    assert {item.target.rpartition(".")[2] for item in drawn} == {"qk", "gate_up"}
    assert {item.chosen_rank for item in drawn} == {None}
