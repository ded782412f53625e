"""The factorization benchmark on small shapes: its errors, its table and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from measure import bench_factorization as benchmark

pytestmark = pytest.mark.whole


def test_results_are_written_and_the_errors_agree(tmp_path: Path) -> None:
    assert benchmark.main(["--scale", "64", "--repeats", "2", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "factorization.json").read_text())
    assert [row["shape"] for row in results["rows"].values()] == [[128, 64], [344, 64]]
    for row in results["rows"].values():
        assert len(row["joint_seconds"]) == len(row["svd_seconds"]) == 2
        assert abs(row["error_difference"]) < 1e-6
        assert 0.1 < row["joint_error"] < 0.5
        assert row["full_svd"] > 0
    assert "| q, k | 128 × 64 |" in (tmp_path / "factorization.md").read_text(encoding="utf-8")


def test_a_default_svd_beyond_the_budget_is_skipped_with_the_reason() -> None:
    assert benchmark.full_svd(torch.eye(4), 400, 300).startswith("skipped: about 400 s")


def test_the_error_is_that_of_the_product() -> None:
    W = benchmark.stacked_matrix(40, 16, torch.device("cpu"))
    up, down = benchmark.joint(W, 5)
    expected = float((W - up @ down).norm() / W.norm())
    assert benchmark.relative_error(W, (up, down)) == pytest.approx(expected, rel=1e-5)
