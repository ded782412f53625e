"""Experts are rounded by the tokens that are routed to them, where those suffice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from made_recipes import made_recipe

from rk_export.calibration import dense_statistics as known
from rk_export.calibration.layer_statistics import FromDense
from rk_export.calibration.sensitivity import dense_statistics
from rk_export.matrix_id import MatrixId
from rk_export.options.quantization import QuantSpec
from rk_export.planning.planner import decide_plan
from rk_export.report.records import Finding
from rk_export.rewrite.apply import rewrite
from rk_export.source.stored import StoredModel

SourceOf = Callable[..., StoredModel]
CPU = torch.device("cpu")


def _experts(source: StoredModel, statistics: known.DenseStatistics) -> list[Finding]:
    recipe = made_recipe(groups=(), quant=QuantSpec(4, 16), quantizer="gptq")
    found = rewrite(source, decide_plan(source, recipe), statistics=FromDense(statistics)).findings
    return [finding for finding in found if finding.target.endswith("experts")]


def test_experts_are_rounded_by_what_they_read(source_of: SourceOf, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of("mixtral")
    tokens = torch.randint(3, 160, (12, 32), generator=torch.Generator().manual_seed(0))
    statistics = dense_statistics(source, tokens, diagonal=True, device=CPU, gradient_tokens=0)
    gates = [statistics.reads[MatrixId(0, f"mlp.experts.{number}.gate_proj")] for number in range(4)]
    assert sum(gates) == 2 * tokens.numel()  # two experts a token
    assert statistics.reads[MatrixId(0, "self_attn.q_proj")] == tokens.numel()
    monkeypatch.setattr(known, "READS_PER_INPUT", 0.0)
    by_tokens = _experts(source, statistics)
    monkeypatch.setattr(known, "READS_PER_INPUT", 1e9)
    by_weights = _experts(source, statistics)
    assert [finding.reason for finding in by_tokens] == ["", ""]
    assert all(finding.details["quantizer"] == "gptq" for finding in by_tokens)
    assert all("12 of 12 matrices of experts read too few tokens" in item.reason for item in by_weights)
    assert all(float(finding.details["weighted_error"]) > 0 for finding in by_tokens)
