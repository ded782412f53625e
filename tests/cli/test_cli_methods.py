"""The published systems and structured pruning from the command line to a bundle, and as options."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from conftest import Cli, Ended

from rk_export.cli.compress_arguments import add_format_arguments, add_rank_arguments, compress_options
from rk_export.cli.method_arguments import NAMED, add_method_arguments
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.heal.options import HealOptions
from rk_export.methods.prune.options import PruneOptions
from rk_export.options.ranks import Budget, RankRule
from rk_export.options.recipe import Recipe
from rk_export.options.texts import TextFile
from rk_export.plan import Plan
from rk_export.report.records import Report


def options(*words: str) -> Recipe:
    parser = argparse.ArgumentParser()
    add_rank_arguments(parser)
    add_method_arguments(parser)
    add_format_arguments(parser)
    found = compress_options(parser.parse_args(words))
    assert found is not None
    return found


@pytest.mark.parametrize("method", NAMED)
def test_presets_keep_floats_and_change_no_weights_before(method: str, task: Path) -> None:
    own = ("--target", str(task)) if method == "basel" else ()
    found = options("--method", method, "--keep", "0.5", *own)
    assert (found.quant, found.embedding_quant, found.preparations) == (None, None, ())


def test_joint_rank_is_the_papers() -> None:
    found = options("--method", "joint-rank", "--keep", "0.9")
    assert (found.rank, found.budget) == (RankRule("keep", 0.9), None)
    assert (found.groups, found.calibration.metric, found.form) == (None, "none", None)
    assert options("--method", "joint-rank", "--rank", "64").rank == RankRule("rank", 64)


def test_other_options_win_over_the_preset() -> None:
    found = options(
        "--method", "joint-rank", "--keep", "0.9", "--metric", "self", "--bits", "8", "--groups", "qkv"
    )
    assert found.groups == ("qkv",)
    assert found.calibration.metric == "self"
    assert found.quant is not None
    assert found.quant.bits == 8


def test_settings_reach_their_method(task: Path) -> None:
    (basel,) = options(
        "--method", "basel", "--target", str(task), "--energy", "0.6", "--steps", "7", "--seed", "3"
    ).methods
    assert basel == BaselOptions(TextFile.of(task), steps=7, seed=3)
    found = options("--method", "cap", "--size", "90MB", "--selector", "auction", "--steps", "9")
    assert found.budget == Budget("size", 90e6)
    assert found.methods == (CapOptions(selector="auction", steps=9),)


def test_pruning_goes_with_every_method() -> None:
    structures = PruneOptions(blocks=2, ffn=0.8, kv_groups=1)
    words = ("--prune-blocks", "2", "--prune-ffn", "0.8", "--prune-heads", "1")
    assert options(*words).methods == (structures,)
    found = options(*words, "--method", "cap", "--keep", "0.5", "--heal", "3").methods
    assert found == (structures, CapOptions(), HealOptions(steps=3))


def done(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.txt"
    path.write_text(" ".join(f"{number} plus 1 is {number + 1}." for number in range(300)))
    return path


@pytest.mark.whole
@pytest.mark.parametrize("method", NAMED)
def test_a_method_ends_in_a_verified_bundle(
    cli: Cli, llama: Path, task: Path, tmp_path: Path, method: str
) -> None:
    own = {
        "joint-rank": (),
        "basel": ("--target", task, "--steps", 4, "--new-basis", 4),
        "cap": ("--steps", 2, "--calibration-tokens", 512),
    }.get(method, ("--calibration-tokens", 512))
    out = tmp_path / "out"
    done(cli("compress", llama, "-o", out, "--method", method, "--keep", 0.6, *own))
    done(cli("verify", out))
    if method != "basel":
        done(cli("verify", out, "--against", llama))
    report = Report.load(out / "report.json")
    assert report.size is not None
    assert report.size.kept_parameters < report.size.dense_parameters
    (method_error,) = (tier.max_error for tier in report.parity if tier.tier == "a")
    assert method_error > 0
    assert "rank" in done(cli("explain", out)).out


@pytest.mark.whole
def test_a_plan_of_sparse_parts_is_applied_and_guarded(cli: Cli, llama: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    search = ("--method", "cap", "--keep", 0.6, "--steps", 2, "--calibration-tokens", 512)
    done(cli("plan", llama, "-o", plan, *search))
    done(cli("compress", llama, "-o", tmp_path / "out", "--plan", plan))
    assert Plan.load(tmp_path / "out" / "plan.json") == Plan.load(plan)
    data = json.loads(plan.read_text())
    data["sites"][0]["entries"] += 1
    plan.write_text(json.dumps(data))
    refused = cli("compress", llama, "-o", tmp_path / "other", "--plan", plan)
    assert refused.code == 2
    assert "the search chose" in refused.err


def test_dry_runs_say_what_would_go(cli: Cli, llama: Path, tmp_path: Path) -> None:
    words = ("--prune-ffn", 0.75, "--prune-blocks", 1, "--bits", 16, "--calibration-tokens", 512)
    text = done(cli("compress", llama, "-o", tmp_path / "none", *words, "--dry-run")).out
    assert "pruned.block_" in text
    assert "ffn_width" in text
    assert not (tmp_path / "none").exists()


@pytest.mark.whole
@pytest.mark.parametrize(("size", "extra"), [(480_000, ()), (340_000, ("--bits", 8))])
@pytest.mark.parametrize("selector", ["policy", "pools", "auction", "wanda", "magnitude"])
def test_a_size_is_met_by_the_files(
    cli: Cli, llama: Path, tmp_path: Path, selector: str, size: int, extra: tuple[object, ...]
) -> None:
    """Beside the matrices stand the embedding, the rotary tables and the graph, which is estimated."""
    out = tmp_path / "out"
    search = ("--method", "cap", "--size", f"{size}", "--selector", selector, "--steps", 2)
    done(cli("compress", llama, "-o", out, *search, *extra, "--calibration-tokens", 512))
    found = sum((out / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert 0.5 * size < found <= size
