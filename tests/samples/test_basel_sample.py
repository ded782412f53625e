"""The sample of basis selection, on a tiny model: every row is measured once, the page says what the rows do."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.whole

SAMPLE = Path(__file__).parents[2] / "samples" / "basel_paper.py"


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, prose: Path, tmp_path: Path) -> ModuleType:
    """The sample, with small texts in place of those that are fetched."""
    spec = importlib.util.spec_from_file_location("basel_paper", SAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "basel_paper", module)
    spec.loader.exec_module(module)
    longer = tmp_path / "task.txt"
    longer.write_text(prose.read_text(encoding="utf-8") * 4, encoding="utf-8")
    monkeypatch.setattr("rk_export.tensor_cache.CACHE", tmp_path / "cache")
    monkeypatch.setattr(module, "TARGETS", {"arithmetic": lambda _: longer, "code": lambda _: longer})
    monkeypatch.setattr(module, "wiki_text", lambda _: prose)
    monkeypatch.setattr(module, "TOKENS", 64)
    monkeypatch.setattr(module, "CONTEXT", 32)
    monkeypatch.setattr(module, "SEQUENCE", 32)
    monkeypatch.setattr(module, "CALIBRATION", 512)
    monkeypatch.setattr(module, "KEPT", (0.9, 0.8))
    monkeypatch.setattr(
        module, "IMPORTANCES", {"arithmetic": ("magnitude", "gradient"), "code": ("gradient",)}
    )
    options = module.BaselOptions
    monkeypatch.setattr(
        module, "BaselOptions", lambda *a, **o: options(*a, **o, batch_tokens=64, new_basis=2)
    )
    return module


def test_rows_are_measured_once_and_read_out(
    sample: ModuleType, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    base = ["--model", str(llama), "--work", str(tmp_path / "work"), "--results", str(out), "--steps", "3"]
    sample.main([*base, "--rows", "dense", "svd-*", "svdllm-code-0.9", "basel-*"])
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

    monkeypatch.setattr(sample.Comparison, "_svd", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(sample.Comparison, "_basel", lambda *_: pytest.fail("measured again"))
    sample.main([*base, "--rows", "svd-*", "basel-*"])
    assert json.loads((out / "basel.json").read_text())["rows"] == rows
