"""`analyze` marks the ranks that `plan` chooses from the same options, or those of a plan file."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cli

from rk_export.plan import Plan
from rk_export.report.records import Report

pytestmark = pytest.mark.whole

TEXT = ("--calibration-tokens", 512)


@pytest.mark.parametrize(
    "options",
    [
        ("--groups", "qk,gate_up", "--keep", 0.5, "--uniform", "--rank-multiple", 1),
        ("--keep", 0.5, "--uniform", "--allocation", "effective-rank", "--rank-multiple", 1, *TEXT),
        ("--keep", 0.6, "--rank-multiple", 1, *TEXT),
        ("--groups", "q,down", "--energy", 0.5, "--rank-multiple", 1),
    ],
    ids=["uniform", "by spectra", "budget", "energy"],
)
def test_the_ranks_are_those_of_the_plan(
    cli: Cli, llama: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    plan = tmp_path / "plan.json"
    assert cli("plan", llama, "-o", plan, *options).code == 0
    wanted = {site.site: site.rank for site in Plan.load(plan).sites if site.rank}
    for name, asked in (("by options", options), ("by plan", ("--plan", plan))):
        ended = cli("analyze", llama, "-o", tmp_path / name, *asked)
        assert ended.code == 0, ended.err
        drawn = Report.load(tmp_path / name / "report.json").spectra
        assert {item.target: item.chosen_rank for item in drawn if item.chosen_rank} == wanted, name
    assert wanted


def test_without_ranks_the_default_groups_are_drawn(cli: Cli, llama: Path, tmp_path: Path) -> None:
    assert cli("analyze", llama, "-o", tmp_path / "out").code == 0
    drawn = Report.load(tmp_path / "out" / "report.json").spectra
    assert {item.target.rpartition(".")[2] for item in drawn} == {"qk", "gate_up"}
    assert {item.chosen_rank for item in drawn} == {None}
