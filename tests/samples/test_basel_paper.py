"""The sample of basis selection, on a tiny model: every row is measured once, the page says what the rows do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from papers.basel import comparison, main


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, prose: Path, tmp_path: Path) -> None:
    """Small texts in place of those that are fetched, and small trainings."""
    longer = tmp_path / "task.txt"
    longer.write_text(prose.read_text(encoding="utf-8") * 4, encoding="utf-8")
    monkeypatch.setattr("rk_export.tensor_cache.CACHE", tmp_path / "cache")
    monkeypatch.setattr(main, "TEXTS", {"arithmetic": lambda _: longer, "code": lambda _: longer})
    monkeypatch.setattr(main, "wiki_text", lambda _: prose)
    for module in (main, comparison):
        monkeypatch.setattr(module, "TOKENS", 64)
        monkeypatch.setattr(module, "CONTEXT", 32)
    monkeypatch.setattr(comparison, "SEQUENCE", 32)
    monkeypatch.setattr(comparison, "CALIBRATION", 512)
    monkeypatch.setattr(comparison, "KEPT", (0.9, 0.8))
    monkeypatch.setattr("papers.basel.report.KEPT", (0.9, 0.8))
    importances = {"arithmetic": ("magnitude", "gradient"), "code": ("gradient",)}
    monkeypatch.setattr(comparison, "IMPORTANCES", importances)
    options = comparison.BaselOptions
    monkeypatch.setattr(
        comparison, "BaselOptions", lambda *a, **o: options(*a, **o, batch_tokens=64, new_basis=2)
    )


def test_rows_are_measured_once_and_read_out(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    base = ["--model", str(llama), "--work", str(tmp_path / "work"), "--out", str(out), "--steps", "3"]
    main.main([*base, "--rows", "dense", "svd-*", "svdllm-code-0.9", "basel-*"])
    rows = json.loads((out / "basel.json").read_text())["rows"]
    assert {name for name in rows if name.startswith("basel")} == {
        f"basel-{which}"
        for keep in (0.9, 0.8)
        for which in (f"arithmetic-{keep}-magnitude", f"arithmetic-{keep}-gradient", f"code-{keep}-gradient")
    }
    for name, row in rows.items():
        assert set(row["perplexity"]) == {"arithmetic", "code", "wiki"}
        assert name == "dense" or 0.7 * row["asked"] < row["kept"] <= row["asked"]
    text = (out / "basel.md").read_text(encoding="utf-8")
    assert text.count("\n| 0.") == len(rows) - 1
    line = next(line for line in text.splitlines() if line.startswith("- arithmetic at 0.8: perplexity"))
    assert " by magnitude" in line
    assert " by gradient" in line
    assert "outside the target: code " in line
    assert (out / "basel.svg").is_file()
    assert len(list((tmp_path / "work").iterdir())) == 6

    monkeypatch.setattr(comparison.Comparison, "_svd", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(comparison.Comparison, "_basel", lambda *_: pytest.fail("measured again"))
    main.main([*base, "--rows", "svd-*", "basel-*"])
    assert json.loads((out / "basel.json").read_text())["rows"] == rows
