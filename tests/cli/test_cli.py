"""Every command on a tiny model: exit codes, JSON, files, and the same weights by every road."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, Ended

import rk_export
from rk_export.json_codec import from_json
from rk_export.manifest import sha256_of
from rk_export.report.plots import COLORS
from rk_export.report.records import Report
from rk_export.runtime import GenerationOptions, Session
from rk_export.source.stored import open_source

COMMANDS = (
    "compress",
    "analyze",
    "plan",
    "recipes",
    "prepare",
    "export",
    "verify",
    "eval",
    "run",
    "bench",
    "compare",
    "report",
    "bundle",
    "sign",
    "explain",
    "cache",
    "doctor",
)
# The recipe of conftest.tiny_options() as a command line.
UNWEIGHED = ("--set", "calibration.text=none", "--device", "cpu")
GROUPS = ("--set", "factorize.groups=[qk, gate_up]", "--set", "factorize.keep=0.8")
OPTIONS = ("--recipe", "int4", *GROUPS, "--set", "quantize.with=rtn", *UNWEIGHED)
PUBLIC = {
    "check_signature",
    "sign_bundle",
    "W8A8",
    "Budget",
    "CalibrationOptions",
    "Comparison",
    "Correct",
    "DryRun",
    "EvalText",
    "Factorize",
    "Finding",
    "FusionError",
    "InputError",
    "ParityError",
    "ParityTier",
    "Plan",
    "Prepare",
    "ProviderError",
    "QuantSpec",
    "Quantize",
    "RankRule",
    "Recipe",
    "Report",
    "Rewritten",
    "RkExportError",
    "Run",
    "SpeedTest",
    "StoredModel",
    "Target",
    "TextFile",
    "UnsupportedModelError",
    "analyze",
    "assert_parity",
    "compare",
    "comparison_html",
    "compress",
    "deployment_files",
    "dry_run",
    "evaluate",
    "evaluate_models",
    "explain",
    "export",
    "findings_table",
    "kept_parameters",
    "library_versions",
    "load_tasks",
    "make_plan",
    "open_source",
    "parity_text",
    "perplexity_of",
    "prepare",
    "quiet_libraries",
    "rewrite_model",
    "score_table",
    "text_table",
    "torch_logits",
    "verify",
    "PruneOptions",
    "BaselOptions",
    "CapOptions",
    "SslcOptions",
    "HealOptions",
}


def ok(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    return ended


def weights(bundle: Path) -> str:
    return sha256_of(bundle / "model.onnx.data")


# --- names and help


def test_public_names() -> None:
    assert set(rk_export.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(rk_export, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        rk_export.magic  # noqa: B018


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli: Cli, command: str) -> None:
    text = ok(cli(command, "--help")).out
    assert text.startswith(f"usage: rk-export {command}")


def test_help_lists_every_command(cli: Cli) -> None:
    text = ok(cli("--help")).out
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("    ") and line[4] != " "]
    assert listed == list(COMMANDS)
    assert cli().code == 2


# --- compress and its other forms


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def compressed(llama: Path, work: Path) -> Path:
    """A bundle from a process of its own (another hash seed, too), with its checkpoint."""
    arguments = ("compress", llama, "-o", work / "bundle", "--checkpoint", work / "checkpoint", *OPTIONS)
    extra = ("--threads", 1, "--json")
    done = subprocess.run(
        [sys.executable, "-m", "rk_export.cli.main", *map(str, (*arguments, *extra))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert done.returncode == 0, done.stderr
    (work / "printed.json").write_text(done.stdout, encoding="utf-8")
    return work / "bundle"


@pytest.mark.whole
def test_printed_report_is_the_stored_one(compressed: Path, work: Path) -> None:
    printed = Report.from_json(json.loads((work / "printed.json").read_text(encoding="utf-8")))
    assert printed == Report.load(compressed / "report.json")
    assert "--recipe int4" in printed.command


@pytest.mark.whole
def test_bundle_is_complete(compressed: Path) -> None:
    files = {str(path.relative_to(compressed)) for path in compressed.rglob("*") if path.is_file()}
    assert files == {
        *("README.md", "report.html", "report.json", "plan.json", "recipe.yaml", "rk_manifest.json"),
        *("model.onnx", "model.onnx.data", "config.json", "generation_config.json", "genai_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


@pytest.mark.whole
def test_same_input_gives_the_same_bytes(bundle: Path, compressed: Path) -> None:
    assert weights(compressed) == weights(bundle)
    assert sha256_of(compressed / "model.onnx") == sha256_of(bundle / "model.onnx")


@pytest.mark.whole
def test_a_plan_gives_the_same_weights(cli: Cli, llama: Path, compressed: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    ok(cli("plan", llama, "-o", plan, *OPTIONS))
    assert plan.read_bytes() == (compressed / "plan.json").read_bytes()
    printed = ok(cli("compress", llama, "-o", out, "--plan", plan, "--threads", 1)).out
    assert "Parity" in printed
    assert weights(out) == weights(compressed)


@pytest.mark.whole
def test_a_checkpoint_gives_the_same_weights(cli: Cli, compressed: Path, work: Path, tmp_path: Path) -> None:
    ok(cli("export", work / "checkpoint", "-o", tmp_path / "out", "--threads", 1))
    assert weights(tmp_path / "out") == weights(compressed)
    assert sha256_of(tmp_path / "out" / "model.onnx") == sha256_of(compressed / "model.onnx")
    ended = cli("export", work / "checkpoint", "-o", tmp_path / "other", "--ep", "portable")
    assert (ended.code, (tmp_path / "other").exists()) == (2, False)
    assert "a checkpoint holds its own execution provider" in ended.err


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_writes_nothing(cli: Cli, llama: Path, tmp_path: Path, as_json: bool) -> None:
    command = ("compress", llama, "-o", tmp_path / "out", *OPTIONS, "--dry-run")
    printed = ok(cli(*command, *(["--json"] if as_json else []))).out
    assert list(tmp_path.iterdir()) == []
    if as_json:
        targets = {finding["target"] for finding in json.loads(printed)["findings"]}
        assert targets > {"layers.0.qk", "layers.1.gate_up", "layers.1.v"}
    else:
        assert "layers.1.gate_up" in printed


@pytest.mark.whole
def test_export_of_a_dense_model(cli: Cli, llama: Path, tmp_path: Path) -> None:
    printed = ok(cli("export", llama, "-o", tmp_path / "out", "--threads", 1, "--json")).out
    tiers = {tier.tier: tier for tier in Report.from_json(json.loads(printed)).parity}
    assert tiers["a"].max_error == tiers["b"].max_error == tiers["d"].max_error == 0


def test_analyze(cli: Cli, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok(cli("analyze", llama, "-o", out, *OPTIONS))
    report = Report.load(out / "report.json")
    model = open_source(llama).load()
    members = {"qk": ("self_attn.q_proj", "self_attn.k_proj"), "gate_up": ("mlp.gate_proj", "mlp.up_proj")}
    targets = [(layer, group) for layer in (0, 1) for group in members]
    for spectrum, (layer, group) in zip(report.spectra, targets, strict=True):
        assert spectrum.target == f"layers.{layer}.{group}"
        stacked = torch.cat([model.model.layers[layer].get_submodule(path).weight for path in members[group]])
        expected = torch.linalg.svdvals(stacked.detach()).numpy()
        np.testing.assert_allclose(spectrum.singular_values, expected, rtol=1e-4)
    names = [f"spectra-{group}.{suffix}" for group in members for suffix in ("svg", "png")]
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html", *names}
    curve = f"stroke: {COLORS[0]}; stroke-width: 1.4"
    assert all((out / name).read_text("utf-8").count(curve) == 2 for name in names if name.endswith("svg"))


# --- bundles


@pytest.mark.whole
def test_verify(cli: Cli, llama: Path, bundle: Path) -> None:
    alone = ok(cli("verify", bundle, "--threads", 1)).out
    assert alone.count("pass") >= len("defg")
    assert "fail" not in alone.lower()
    tiers = json.loads(ok(cli("verify", bundle, "--against", llama, "--threads", 1, "--json")).out)
    assert "".join(tier["tier"] for tier in tiers) == "0pabcdefghi"


@pytest.mark.whole
def test_verify_ends_with_one_when_parity_fails(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strict(*args: Any, **options: Any) -> Any:
        return replace(from_json(*args, **options), level_bound=1e-9)

    monkeypatch.setattr("rk_export.commands.verify.from_json", strict)
    ended = cli("verify", bundle, "--provider", "cpu", "--threads", 1, "--json")
    assert ended.code == 1
    assert [tier["tier"] for tier in json.loads(ended.out) if tier["passed"] is False] == ["d"]


@pytest.mark.whole
def test_eval_of_model_checkpoint_and_bundle(
    cli: Cli, llama: Path, compressed: Path, work: Path, prose: Path
) -> None:
    options = ("--text", prose, "--context", 64, "--tokens", 128, "--provider", "cpu")

    def perplexity(model: Path) -> float:
        result = json.loads(ok(cli("eval", model, *options, "--json")).out)
        assert (result["tokens"], result["windows"], result["context"]) == (126, 2, 64)
        return float(result["perplexity"])

    assert perplexity(compressed) == pytest.approx(perplexity(work / "checkpoint"), rel=0.1)
    assert perplexity(llama) != pytest.approx(perplexity(compressed), rel=0.01)
    assert "perplexity " in ok(cli("eval", compressed, *options)).out


@pytest.mark.whole
def test_run(cli: Cli, bundle: Path) -> None:
    options = (bundle, "-p", "The harbour", "--provider", "cpu", "--max-new-tokens", 8)
    greedy = ok(cli("run", *options)).out
    assert greedy == ok(cli("run", *options)).out
    session = Session.from_pretrained(bundle, provider="cpu")
    expected = session.generate(["The harbour"], options=GenerationOptions(max_new_tokens=8))[0].text
    assert expected
    assert greedy.rstrip("\n").endswith(expected.rstrip("\n"))
    assert greedy != ok(cli("run", *options, "--chat", "--system", "Be brief.")).out
    sampled = ("run", *options, "--temperature", 2.0, "--top-p", 0.95, "--seed")
    assert ok(cli(*sampled, 1)).out == ok(cli(*sampled, 1)).out != ok(cli(*sampled, 2)).out


@pytest.mark.whole
def test_bench(cli: Cli, bundle: Path, compressed: Path) -> None:
    counts = ("--prompt-tokens", 16, "--new-tokens", 2, "--repeats", 2, "--threads", 1, "--provider", "cpu")
    result = json.loads(ok(cli("bench", bundle, "--against", compressed, *counts, "--json")).out)
    assert [row["name"] for row in result["rows"]] == [str(bundle), str(compressed)]
    assert all(speed > 0 for row in result["rows"] for speed in (*row["prefill"], *row["decode"]))
    assert "decode tok/s" in ok(cli("bench", bundle, *counts)).out


@pytest.mark.whole
def test_explain(cli: Cli, bundle: Path) -> None:
    text = ok(cli("explain", bundle)).out
    assert {"layers.0.qk", "layers.1.gate_up", "layers.1.down"} <= set(text.split())
    findings: list[dict[str, Any]] = json.loads(ok(cli("explain", bundle, "--json")).out)
    outcomes = {finding["target"]: finding["outcome"] for finding in findings}
    beside = {name: outcomes.pop(name) for name in ("norms", "rotary frequencies")}
    assert set(outcomes.values()) == {"applied"}
    assert set(beside.values()) == {"skipped"}


@pytest.mark.whole
def test_explain_leaves_no_matrix_out(cli: Cli, llama: Path, tmp_path: Path) -> None:
    options = ("--recipe", "floats", "--set", "factorize.groups=[qk]", "--set", "factorize.keep=0.8")
    ok(cli("compress", llama, "-o", tmp_path / "out", *options, "--checkpoint", tmp_path / "checkpoint"))
    told = {item["target"]: item for item in json.loads(ok(cli("explain", tmp_path / "out", "--json")).out)}
    assert told["layers.0.qk"]["outcome"] == "applied"
    assert told["layers.0.down"]["reason"] == "not asked for: stays dense, in floats"
    ok(cli("export", tmp_path / "checkpoint", "-o", tmp_path / "again"))
    told = {item["target"]: item for item in json.loads(ok(cli("explain", tmp_path / "again", "--json")).out)}
    assert told["layers.0.qk"]["reason"] == "came so from the checkpoint"
    assert set(told) >= {f"layers.1.{role}" for role in ("qk", "v", "o", "gate", "up", "down")}


def test_doctor(cli: Cli) -> None:
    diagnosis = json.loads(ok(cli("doctor", "--json")).out)
    assert diagnosis["ok"] is True


@pytest.mark.whole
@pytest.mark.parametrize(("raised", "code"), [(BrokenPipeError, 0), (KeyboardInterrupt, 130)])
def test_ends_from_outside(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException], code: int
) -> None:
    def end(_: object) -> int:
        raise raised

    monkeypatch.setattr("rk_export.cli.parser.run_explain", end)
    ended = cli("explain", bundle)
    assert ended.code == code
    assert "Traceback" not in ended.err
