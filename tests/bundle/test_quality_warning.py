"""A compressed model that is far from the dense one is announced, not hidden behind passing tiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Cli, tiny_options

from rk_export import compress
from rk_export.bundle.quality_warning import FAR, divergence
from rk_export.options.quantization import QuantSpec
from rk_export.options.run import Run
from rk_export.report.records import Report


def test_divergence_is_that_of_torch() -> None:
    dense, other = torch.randn(2, 3, 4, 50, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.nn.functional.kl_div(
        other.log_softmax(-1).flatten(0, 1),
        dense.log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    assert divergence(dense, other) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.whole
def test_a_ruined_model_says_so_first(cli: Cli, llama: Path, tmp_path: Path) -> None:
    ended = cli(
        *("compress", llama, "-o", tmp_path / "out", "--recipe", "int2", "--device", "cpu"),
        *("--set", "factorize.keep=0.1", "--set", "factorize.rank_multiple=1"),
        *("--set", "calibration.text=none", "--set", "quantize.with=rtn"),
    )
    assert ended.code == 0, ended.err
    assert ended.out.startswith("WARNING: the compressed model is far from the dense one")
    assert "What would help: keep more of the model; more bits" in ended.out.replace("\n", " ")
    assert "WARNING" in ended.err
    report = Report.load(tmp_path / "out" / "report.json")
    assert f"{FAR}" in report.warnings[0]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.index("far from the dense one") < page.index("Summary")


@pytest.mark.whole
def test_a_close_model_says_nothing(llama: Path, tmp_path: Path) -> None:
    options = tiny_options(groups=(), rank=None, quant=QuantSpec(8, 32))
    report = compress(llama, tmp_path / "out", options, run=Run(threads=1))
    assert report.warnings == ()
