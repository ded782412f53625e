"""The pipeline from Python: every form of compression keeps parity, plans do what they say, encoders too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_options
from tiny_models import tiny_model

from rk_export import DryRun, Plan, compress, dry_run, make_plan, verify
from rk_export.errors import InputError
from rk_export.json_codec import to_json
from rk_export.manifest import check_manifest
from rk_export.options.quantization import QuantSpec
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.report.matrix_groups import matrix_groups
from rk_export.report.records import Outcome, Report
from rk_export.rewrite.checkpoint import load_pretrained
from rk_export.runtime import EncoderSession, Session
from rk_export.runtime.providers import cuda_obstacle
from rk_export.source.stored import open_source

pytestmark = pytest.mark.whole

FORMS: dict[str, dict[str, Any]] = {
    "floats": {"quant": None, "table": None},
    "dense INT4": {"groups": ()},
    "per head": {"qk": "per-head"},
    "all joined": {"groups": ("qkv", "gate_up")},
    "separate": {"groups": ("q", "k", "down")},
    "INT8 with zero points": {"quant": QuantSpec(8, 16, symmetric=False)},
    "float embedding": {"table": None},
    "balanced": {"gauge": "balanced"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_keeps_parity(llama: Path, tmp_path: Path, form: str) -> None:
    report = compress(llama, tmp_path / "out", tiny_options(**FORMS[form]), run=Run(threads=1))
    assert "".join(tier.tier for tier in report.parity) == "0pabcdefghi"
    assert all(tier.passed for tier in report.parity if tier.bound is not None)
    assert all(fusion.found == fusion.planned for fusion in report.fusions)
    again = verify(tmp_path / "out", provider="cpu", run=Run(threads=1))
    assert all(tier.passed for tier in again if tier.bound is not None)


@pytest.mark.parametrize("ep", ["cpu", "portable", "cuda"])
def test_bundle_computes_what_the_checkpoint_computes(
    llama: Path, tmp_path: Path, tolerance: dict[str, float], device: str, ep: Any
) -> None:
    options = tiny_options(ep=ep, accuracy_level=0)
    run = Run(device, threads=1)
    report = compress(llama, tmp_path / "out", options, checkpoint=tmp_path / "checkpoint", run=run)
    provider: Any = "cuda" if ep == "cuda" and cuda_obstacle() is None else "cpu"
    noticed = any("not on CUDA" in notice for notice in report.notices)
    assert noticed == (ep == "cuda" and provider == "cpu")

    ids = np.random.default_rng(0).integers(3, 300, (2, 12))
    session = Session.from_pretrained(tmp_path / "out", provider=provider, threads=1)
    found = session.prefill_logits(ids).astype(np.float32)
    with torch.no_grad():
        expected = load_pretrained(tmp_path / "checkpoint").model(torch.from_numpy(ids)).logits.numpy()
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < tolerance[options.target.float_dtype]


def test_report_and_manifest_tell_the_run(llama: Path, bundle: Path) -> None:
    report = Report.load(bundle / "report.json")
    assert (report.model, report.model_type) == (llama.name, "llama")
    assert list(report.timings) == [
        "load",
        "check",
        "calibrate",
        "plan",
        "rewrite",
        "export",
        "bundle",
        "verify",
    ]
    assert len(report.layer_errors) == 2
    assert [spectrum.target for spectrum in report.spectra][:2] == ["layers.0.qk", "layers.0.gate_up"]
    manifest = check_manifest(bundle)
    assert manifest["source"] == {"model": llama.name, "structure": open_source(llama).structure()}
    assert manifest["parity"] == to_json(report.parity)
    assert [len(prompt) for prompt in manifest["golden"]["probe"]["prompts"]] == [32] * 8


@pytest.mark.usefixtures("made_up_rates")
def test_sizes_are_known_before_the_work(llama: Path, bundle: Path) -> None:
    def sizes(report: Report | DryRun) -> dict[str, tuple[int, int]]:
        groups = matrix_groups(report.findings)
        return {group.target: (group.bytes_before, group.bytes_after) for group in groups}

    report = Report.load(bundle / "report.json")
    assert sizes(dry_run(llama, tiny_options())) == sizes(report)
    assert report.size is not None
    assert report.size.file_bytes == sum(
        (bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data")
    )
    beside_the_weights = report.size.file_bytes - report.size.compressed_bytes
    assert 0 < beside_the_weights < 40_000, "the graph itself and the rotary tables"


def test_an_edited_plan_is_what_is_done(llama: Path, tmp_path: Path) -> None:
    plan = make_plan(llama, tiny_options(groups=("qk",)))
    assert [site.rank for site in plan.sites if site.form == "joint"] == [24, 24]
    edited = tmp_path / "plan.json"
    sites = [replace(site, rank=16) if site.site == "layers.1.qk" else site for site in plan.sites]
    replace(plan, sites=tuple(sites)).save(edited)

    report = compress(llama, tmp_path / "out", plan=Plan.load(edited), run=Run(threads=1))
    ranks = {group.target: group.rank for group in matrix_groups(report.findings) if group.rank}
    assert ranks == {"layers.0.qk": 24, "layers.1.qk": 16}
    assert (tmp_path / "out" / "plan.json").read_bytes() == edited.read_bytes()


@pytest.mark.usefixtures("made_up_rates")
def test_a_group_beyond_break_even_stays_dense_and_says_so(llama: Path) -> None:
    report = dry_run(llama, tiny_options(rank_multiple=64))
    skipped = [finding for finding in report.findings if finding.outcome is Outcome.SKIPPED]
    refused = [finding for finding in skipped if finding.target.startswith("layers.")]
    assert [finding.target for finding in refused][:1] == ["layers.0.qk"]
    assert all("break-even" in finding.reason for finding in refused)


def test_a_model_without_a_tokenizer_is_verified_on_random_tokens(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    report = compress(tmp_path / "model", tmp_path / "out", tiny_options(), run=Run(threads=1))
    assert all(tier.passed for tier in report.parity if tier.bound is not None)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_encoder(tmp_path: Path, tolerance: dict[str, float]) -> None:
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "model")
    report = compress(tmp_path / "model", tmp_path / "out", tiny_options(groups=("qk",)), run=Run(threads=1))
    assert "".join(tier.tier for tier in report.parity) == "0pabcdf"
    assert not (tmp_path / "out" / "genai_config.json").exists()
    tiers = verify(tmp_path / "out", tmp_path / "model", provider="cpu", run=Run(threads=1))
    assert [tier.passed for tier in tiers] == [True, True, None, None, True, True, True]
    with pytest.raises(InputError, match="can only be verified against its model"):
        verify(tmp_path / "out")

    compress(tmp_path / "model", tmp_path / "dense", Recipe())
    ids = np.array([[5, 6, 7, 8]])
    found = EncoderSession.from_pretrained(tmp_path / "dense", provider="cpu").forward(ids)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(found, expected, atol=tolerance["fp32"] * np.abs(expected).max())


def test_config_tells_no_private_path(llama: Path, bundle: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "genai_config.json"):
        values = json.loads((bundle / name).read_text(encoding="utf-8"))
        assert str(llama) not in json.dumps(values), name
