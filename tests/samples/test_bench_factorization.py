"""The factorization benchmark on small shapes: its errors, its table and its file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.whole

SAMPLE = Path(__file__).parents[2] / "samples" / "bench_factorization.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(SAMPLE.stem, SAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, SAMPLE.stem, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_results_are_written_and_the_errors_agree(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["--scale", "64", "--repeats", "2", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "factorization.json").read_text())
    assert [row["shape"] for row in results["rows"]] == [[128, 64], [344, 64]]
    for row in results["rows"]:
        assert len(row["joint_seconds"]) == len(row["svd_seconds"]) == 2
        assert abs(row["error_difference"]) < 1e-6
        assert 0.1 < row["joint_error"] < 0.5
        assert row["full_svd"] > 0
    printed = capsys.readouterr().out
    assert (tmp_path / "factorization.md").read_text().endswith(f"\n\n{printed}")
    assert "128 × 64" in printed


def test_a_default_svd_beyond_the_budget_is_skipped_with_the_reason(benchmark: ModuleType) -> None:
    assert benchmark.full_svd(torch.eye(4), 400, 300).startswith("skipped: about 400 s")


def test_the_error_is_that_of_the_product(benchmark: ModuleType) -> None:
    W = benchmark.stacked_matrix(40, 16, torch.device("cpu"))
    up, down = benchmark.joint(W, 5)
    expected = float((W - up @ down).norm() / W.norm())
    assert benchmark.relative_error(W, (up, down)) == pytest.approx(expected, rel=1e-5)
