"""The samples on pruning and on sparse files, on tiny models: their rows, their pages, and that they go on."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rk_export.source.stored import StoredModel

pytestmark = pytest.mark.whole

SAMPLES = Path(__file__).parents[2] / "samples"


def sample(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_pruning_is_measured_once_a_row(
    llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruning = sample("prune_structures")
    where = ["--model", str(llama), "--text", str(prose), "--tokens", "256", "--context", "64"]
    wanted = ["dense", "blocks-1", "ffn-0.7-by-weights", "ffn-0.8*"]
    pruning.main([*where, "--out", str(tmp_path), "--rows", *wanted])
    rows = {row["name"]: row for row in json.loads((tmp_path / "pruning.json").read_text())["rows"]}
    assert list(rows) == ["dense", "blocks-1", "ffn-0.8", "ffn-0.8-by-weights"]
    assert rows["dense"]["kept"] == 1
    assert rows["blocks-1"]["kept"] == 0.5
    assert rows["ffn-0.8"]["went"] == "32 neurons a block"
    assert 1 > rows["ffn-0.8"]["kept"] > 0.5
    monkeypatch.setattr(pruning, "measure", None)  # a second measurement would fail
    pruning.main([*where, "--out", str(tmp_path), "--rows", *wanted])
    page = (tmp_path / "pruning.md").read_text()
    assert "by the norms of the weights alone" in page
    assert (tmp_path / "pruning.svg").stat().st_size > 1000


def test_three_ways_to_store_entries_compute_the_same(
    source_of: Callable[..., StoredModel], tmp_path: Path
) -> None:
    measuring = sample("measure_sparse_export")
    source = source_of("llama", max_position_embeddings=512)
    rows = measuring.measure(source, 0.3, 1, tmp_path)
    assert [row.storage for row in rows] == list(measuring.STORAGES)
    assert [row.difference for row in rows] == [0, 0, 0]
    dense, sparse, ours = (row.megabytes for row in rows)
    assert ours < sparse < 1.1 * dense
    assert "3-byte entries" in measuring.markdown(rows)
