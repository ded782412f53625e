"""The measurements on tiny models: their rows, their pages, and that they go on where they stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import (
    bench_sampling,
    check_cuda,
    factorize_groupings,
    harness,
    measure_export,
    measure_sparse_export,
    prune_structures,
    real_models,
    sweep,
    time_formats,
)
from measure.harness import Results

from rk_export import CalibrationOptions, EvalText, StoredModel, open_source

pytestmark = pytest.mark.whole


@pytest.fixture
def where(llama: Path, prose: Path, tmp_path: Path) -> list[str]:
    return ["--model", str(llama), "--text", str(prose), "--out", str(tmp_path)]


def rows_in(path: Path) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def test_groupings(where: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--tokens", "64", "--context", "32"]
    assert factorize_groupings.main([*where, *sizes, "--rows", "dense", "q*k*@0.9"]) == 0
    rows = {row["grouping"]: row for row in rows_in(tmp_path / "groupings.json").values()}
    assert set(rows) == {"dense", "qk-whole", "qk-per-head", "q+k-separate", "qkv", "q+k+v-separate"}
    assert all(0.8 < row["kept"] <= 0.9 for name, row in rows.items() if name != "dense")
    assert all(0 < row["relative_error"] < 1 for name, row in rows.items() if name != "dense")
    assert "qk-whole at 0.9: perplexity" in (tmp_path / "groupings.md").read_text(encoding="utf-8")

    monkeypatch.setattr(factorize_groupings, "measure", lambda *_: pytest.fail("measured again"))
    assert factorize_groupings.main([*where, *sizes, "--rows", "q*k*@0.9"]) == 0


def test_relative_error_of_groupings_is_that_of_the_matrices(llama: Path, prose: Path) -> None:
    grouping = next(item for item in factorize_groupings.GROUPINGS if item.name == "q+k-separate")
    row = factorize_groupings.measure(llama, grouping, 0.9, EvalText(prose, 32, 64))
    lost = total = 0.0
    for layer in open_source(llama).load().model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            values = torch.linalg.svdvals(linear.weight.double())
            rank = int(0.9 * linear.weight.numel() / sum(linear.weight.shape))
            lost += float(values[rank:].square().sum())
            total += float(values.square().sum())
    assert row["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_pruning(where: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        "--tokens",
        "256",
        "--context",
        "64",
        "--rows",
        "dense",
        "blocks-1",
        "ffn-0.7-by-weights",
        "ffn-0.8*",
    ]
    assert prune_structures.main([*where, *wanted]) == 0
    rows = rows_in(tmp_path / "pruning.json")
    assert list(rows) == ["dense", "blocks-1", "ffn-0.8", "ffn-0.8-by-weights"]
    assert rows["dense"]["kept"] == 1
    assert rows["blocks-1"]["kept"] == 0.5
    assert rows["blocks-1"]["went"].startswith("blocks ")
    assert rows["ffn-0.8"]["went"] == "32 neurons a block"
    assert 1 > rows["ffn-0.8"]["kept"] > 0.5

    monkeypatch.setattr(prune_structures, "measure", lambda *_: pytest.fail("measured again"))
    assert prune_structures.main([*where, *wanted]) == 0
    assert "by the norms of the weights alone" in (tmp_path / "pruning.md").read_text(encoding="utf-8")
    assert (tmp_path / "pruning.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_sweep(llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TEXTS": {"wiki": lambda: prose},
        "TOKENS": 64,
        "CONTEXT": 32,
        "KEPT": (0.8,),
        "MEGABYTES": (0.45,),
        "HEAL_STEPS": 2,
        "TEXT_METRIC": CalibrationOptions("self", tokens=512),
    }.items():
        monkeypatch.setattr(sweep, name, value)
    places = ["--model", str(llama), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert sweep.main([*places, "--threads", "1", "--rows", "dense", "kept-*", "healed-0.8", "size-*"]) == 0
    rows = rows_in(tmp_path / "pareto.json")
    assert {row["series"] for row in rows.values()} == {
        *("dense", "paper 1", "SVD-LLM", "joint + identity", "rk-export", "healed"),
    }
    assert rows["healed-0.8"]["perplexity"] != rows["kept-rk-export-0.8"]["perplexity"]
    assert rows["size-0.45"]["file_bytes"] <= 0.45e6
    assert rows["size-0.45"]["x"] == rows["size-0.45"]["file_bytes"] / 1e6
    page = (tmp_path / "pareto.md").read_text(encoding="utf-8")
    assert "| 0.8 | SVD-LLM |" in page
    assert "rk-export (size-0.45)" in page


def test_three_ways_to_store_entries_compute_the_same(
    source_of: Callable[..., StoredModel], tmp_path: Path
) -> None:
    folder = source_of("llama", max_position_embeddings=512).folder
    results = Results(tmp_path / "out", "sparse_export")
    results.rows = measure_sparse_export.measure(folder, 0.3, 1, tmp_path)
    rows = results.rows.values()
    assert [row["storage"] for row in rows] == list(measure_sparse_export.STORAGES)
    assert [row["difference"] for row in rows] == [0, 0, 0]
    dense, sparse, ours = (row["megabytes"] for row in rows)
    assert ours < sparse < 1.1 * dense
    assert "3-byte entries" in measure_sparse_export.page(results)


def test_export_is_measured_in_a_process_of_its_own(llama: Path, tmp_path: Path) -> None:
    assert measure_export.main(["--model", str(llama), "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "export.json")
    assert rows["float32"]["fp32_bytes"] == 4 * open_source(llama).parameter_count()
    assert rows["float32"]["file_bytes"] > rows["INT4"]["file_bytes"] > 0
    assert "of fp32" in (tmp_path / "export.md").read_text(encoding="utf-8")


def test_real_models_measures_a_decoder(llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_models, "wiki_text", lambda _: prose)
    monkeypatch.setattr(real_models, "WINDOW", 32)
    row = real_models.measure(llama, 1, is_encoder=False)
    assert row["ratio"] == pytest.approx(row["bundle"] / row["dense"], abs=1e-3)
    assert row["tiers"]["c"][1] is True


def test_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_formats, "PAIRS", 1)
    results = Results(Path("absent"), "formats")
    results.rows = {phase: time_formats.measure(2, 1) for phase in time_formats.PHASES}
    lines = time_formats.page(results).splitlines()
    assert "| INT4 block 32 |" in "\n".join(lines)
    assert len([line for line in lines if line.startswith("| INT")]) == len(time_formats.FORMATS)


def test_sampling() -> None:
    results = Results(Path("absent"), "sampling", {"repeats": 2})
    results.rows = {key: measure() for key, measure in bench_sampling.wanted(2)}
    table = bench_sampling.page(results).splitlines()[-len(bench_sampling.OPTIONS) :]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table] == list(bench_sampling.OPTIONS)
    slowest = max(row["least_ms"] for row in results.rows.values() if row["options"] == "top-p 0.9")
    assert any(f"{slowest:.2f} / " in line for line in table)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(llama: Path, tmp_path: Path) -> None:
    places = ["--model", str(llama), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert check_cuda.main([*places, "--rows", "INT4 dense"]) == 0
    assert rows_in(tmp_path / "cuda.json")["INT4 dense"]["parity"]["c"][2] is True


def test_bad_input_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = ["--model", str(tmp_path / "absent"), "--text", str(tmp_path), "--out", str(tmp_path)]
    assert factorize_groupings.main(absent) == 2
    assert "Fix: " in capsys.readouterr().err


def test_the_machine_is_named() -> None:
    assert "CPU cores" in harness.machine()
