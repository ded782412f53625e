"""The comparison of a dry run with what a run takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from measure import dry_run_truth, memory_meter
from measure.memory_meter import Usage

from rk_export.scratch import mapped

PREDICTED = {
    "seconds": 12.0,
    "stages": [
        {"stage": "load", "memory": 100, "disk": 0, "seconds": 2.0},
        {"stage": "check", "memory": 400, "disk": 80, "seconds": 10.0},
    ],
}


def rows() -> list[dict[str, object]]:
    usages = [
        Usage(memory_meter.BEFORE, seconds=1.0, anon=90),
        Usage("load", seconds=2.0, anon=80),
        Usage("check", seconds=25.0, anon=300, disk=88),
    ]
    metered = memory_meter.Metered(usages={(one.stage, ""): one for one in usages})
    return dry_run_truth.rows_of(PREDICTED, metered)


def test_a_ratio_is_measured_over_predicted() -> None:
    load, check, whole = rows()
    assert (load["memory_ratio"], load["seconds_ratio"], load["disk_ratio"]) == (0.9, 1.5, None)
    assert (check["memory_ratio"], check["disk_ratio"], check["seconds_ratio"]) == (0.75, 1.1, 2.5)
    assert (whole["stage"], whole["memory_measured"], whole["seconds_measured"]) == ("whole run", 300, 28.0)


def test_what_is_out_of_its_bound_gets_a_star() -> None:
    load, check, _ = rows()
    assert all(dry_run_truth.is_true(load, kind) for kind in dry_run_truth.BOUNDS)
    assert [dry_run_truth.is_true(check, kind) for kind in ("memory", "disk", "seconds")] == [
        False,
        True,
        False,
    ]
    shown = dry_run_truth.table(rows()).splitlines()[3]
    assert shown.count("*") == 2


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_mapped_files_without_a_name_are_disk(tmp_path: Path) -> None:
    place = tmp_path / ".out.work"
    before = memory_meter.unnamed_bytes([os.getpid()], [tmp_path / "out"])
    kept = mapped({"one": torch.zeros(300_000), "two": torch.ones(10)}, place)
    held = memory_meter.unnamed_bytes([os.getpid()], [tmp_path / "out"])
    elsewhere = memory_meter.unnamed_bytes([os.getpid()], [tmp_path / "other"])
    assert held - before == pytest.approx(1_200_040, abs=5_000)
    assert elsewhere == before == 0
    del kept
