"""SmolLM2-135M-Instruct end to end: the numbers that a change of the method or of the export would move."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli
from fetched import smollm2, wiki_text

from rk_export.report.records import Report
from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine import Engine, EngineOptions, Request

pytestmark = pytest.mark.real_model

MEGABYTE = 10**6


def test_joint_factorization_of_q_and_k(cli: Cli, tmp_path: Path) -> None:
    paper = ("--recipe", "joint-rank", "--set", "factorize.groups=[qk]", "--set", "factorize.keep=0.9")
    out = tmp_path / "out"
    ended = cli("compress", smollm2(), "-o", out, *paper, "--device", "cpu", "--threads", 2, "--json")
    assert ended.code == 0, ended.err
    report = Report.from_json(json.loads(ended.out))

    text = ("--text", wiki_text("eval"), "--tokens", 5120, "--context", 512, "--threads", 2, "--json")
    dense, compressed = (json.loads(cli("eval", model, *text).out) for model in (smollm2(), out))
    assert dense["perplexity"] == pytest.approx(22.477, abs=0.01)
    assert 22.5 < compressed["perplexity"] <= 27.2
    assert [tier.tier for tier in report.parity if tier.passed] == list("0pcdefgi")
    fusions = {fusion.pattern: fusion.found for fusion in report.fusions}
    assert fusions["shared down-projection"] == 30
    assert fusions["GroupQueryAttention"] == 30


def test_int4(cli: Cli, smollm2_int4: Path) -> None:
    # 4.5 bits for each of 106 million weights in layers, 8.5 for each of 28 million of the tied table.
    assert 90 * MEGABYTE < (smollm2_int4 / "model.onnx.data").stat().st_size < 96 * MEGABYTE
    report = Report.load(smollm2_int4 / "report.json")
    assert report.size is not None
    assert report.size.dense_parameters == 134_515_008
    tiers = {tier.tier: tier for tier in report.parity}
    assert tiers["a"].max_error == 0
    assert all(tiers[letter].passed for letter in "0pcdefgi")

    asked = cli("run", smollm2_int4, "-p", "What is the capital of France?", "--chat", "--threads", 2)
    assert "Paris" in asked.out


def test_long_prompts_in_company_are_answered_as_alone(smollm2_int4: Path) -> None:
    """Tier i has short prompts; attention cuts longer ones into blocks, at lengths that these lie around."""
    session = Session.from_pretrained(smollm2_int4, provider="cpu", threads=2)
    rng = np.random.default_rng(1)
    lengths = (64, 65, 129, 257, 300, 385, 513, 520, 769)
    options = GenerationOptions(max_new_tokens=8)
    requests = [Request(tuple(rng.integers(3, 49_000, length).tolist()), options) for length in lengths]
    alone = [session.generate([request.prompt], options=options)[0].token_ids for request in requests]
    with Engine(session, EngineOptions(slots=8, chunk=32, capacity=1024)) as engine:
        for copied in (False, True):
            answers = engine.generate(requests)
            assert [answer.token_ids for answer in answers] == alone
            assert any(answer.cached_tokens for answer in answers) is copied
