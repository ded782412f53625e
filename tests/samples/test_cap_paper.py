"""The sample that compares CAP with its baselines, on the tiny model: rows, page, figures, resumption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from papers.cap import main, workshop

from rk_export import tensor_cache
from rk_export.passes.numerics.low_rank_plus_sparse import Parts, rank_zero_factors

pytestmark = pytest.mark.whole


def test_every_row_page_and_figure(
    llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_cache, "CACHE", tmp_path / "cache")
    out, long = tmp_path / "results", tmp_path / "long.txt"
    long.write_text(3 * prose.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ["--model", str(llama), "--text", str(prose), "--calibration", str(long), "--out", str(out)]
    sizes = ["--tokens", "64", "--context", "32", "--calibration-tokens", "512", "--steps", "4"]
    wanted = [*arguments, *sizes, "--batch-tokens", "128"]
    assert main.main(wanted) == 0
    rows = json.loads((out / "cap.json").read_text())["rows"]
    assert list(rows) == [key for key, _, _ in workshop.wanted()]
    for key, row in rows.items():
        if "@" in key:
            assert 0.9 * row["asked"] < row["kept"] <= row["asked"] * 1.01, key
    assert rows["split"]["kept"] > 1
    assert rows["wanda@0.5"]["bytes"] == pytest.approx(0.75, abs=0.02)
    assert rows["low-rank-pool@0.5"]["bytes"] == pytest.approx(rows["low-rank-pool@0.5"]["kept"])
    assert rows["low-rank-pool@0.5"]["low_rank"] == rows["low-rank-pool@0.5"]["kept"]
    assert rows["magnitude-global@0.8"]["low_rank"] == 0
    assert len(rows["policy@0.8"]["losses"]) == 4
    assert rows["policy@0.5"]["losses"] != rows["policy-energy@0.5"]["losses"]
    assert set(rows["mixture@0.5"]["allocation"]) == {"q", "k", "v", "o", "gate", "up", "down"}
    page = (out / "cap.md").read_text(encoding="utf-8")
    assert all(title in page for title in workshop.TITLES.values())
    assert "The top-K after the search is" in page
    for figure in ("cap.svg", "cap_allocation.svg"):
        assert (out / figure).read_text(encoding="utf-8").startswith("<?xml")

    monkeypatch.setattr(workshop.Workshop, "measure", lambda *_: pytest.fail("measured again"))
    assert main.main(wanted) == 0


def test_bytes_take_the_cheaper_of_columns_and_entries() -> None:
    factors = rank_zero_factors((300, 4), torch.zeros(1))
    full = torch.arange(0, 1200, 4)  # the first column
    parts = Parts(*factors, full, torch.ones(300))
    assert workshop.stored_bytes(parts) == 300 * 2 + 4
    half = Parts(*factors, full[::2], torch.ones(150))
    assert workshop.stored_bytes(half) == 150 * 3
    far = Parts(*factors, torch.tensor([0, 1000]), torch.ones(2))  # a gap of 1000 takes four bytes
    assert workshop.stored_bytes(far) == 5 * 3
    ranked = Parts(torch.ones(300, 2), torch.ones(2, 4), full[:0], torch.ones(0))
    assert workshop.stored_bytes(ranked) == 2 * 304 * 2
