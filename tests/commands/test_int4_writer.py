"""The calibration text of a model that is too large to write it itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from rk_export import Recipe, Run, compress, open_source
from rk_export.calibration import self_text
from rk_export.commands import int4_writer
from rk_export.commands.int4_writer import int4_text
from rk_export.source.stored import StoredModel

pytestmark = pytest.mark.whole


@pytest.fixture
def source(tmp_path: Path) -> StoredModel:
    tiny_model("llama", bos_token_id=1).save_pretrained(tmp_path / "model")
    return open_source(tmp_path / "model")


def test_tokens_are_drawn_as_the_dense_model_draws_them(source: StoredModel, tmp_path: Path) -> None:
    """Rounding to INT4 moves the draws a little; draws by other numbers lie far apart."""
    uniforms = torch.rand(40, 24, generator=torch.Generator().manual_seed(0))
    found = int4_text(source, uniforms, 1, [2], folder=tmp_path)
    assert found.shape == uniforms.shape
    assert bool((found[:, 0] == 1).all())
    with torch.no_grad():
        logits = source.load()(input_ids=found, use_cache=False).logits
    drawn = self_text.draw(logits[:, :-1].flatten(0, 1), uniforms[:, 1:].flatten()).view(40, 23)
    after_end = found[:, :-1] == 2
    assert bool((found[:, 1:][after_end] == 1).all())
    distance = (found[:, 1:] - drawn)[~after_end].abs().float().median()
    others = (found[:, 1:] - drawn.flip(0))[~after_end].abs().float().median()
    assert float(distance) < 0.2 * float(others)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rows_do_not_depend_on_how_many_are_written_together(
    source: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    uniforms = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    together = int4_text(source, uniforms, 1, [2])
    monkeypatch.setattr(int4_writer, "_SEQUENCES", 4)
    assert torch.equal(int4_text(source, uniforms, 1, [2]), together)


def test_the_report_says_who_wrote(
    source: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(self_text, "DENSE_LIMIT", 1000)
    monkeypatch.setattr("rk_export.tensor_cache.CACHE", tmp_path / "cache")
    recipe = Recipe.load("int4")
    with caplog.at_level(logging.INFO):
        report = compress(tmp_path / "model", tmp_path / "out", recipe, run=Run(device="cpu", threads=1))
    assert "writing text in INT4" in caplog.text
    (finding,) = [item for item in report.findings if item.target == "calibration.text"]
    assert "the model in INT4 wrote it" in finding.reason
