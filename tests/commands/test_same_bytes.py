"""A bundle depends on the model, the recipe and the processor, not on how many threads worked on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_bytes import contents
from made_recipes import made_recipe
from threadpoolctl import threadpool_limits
from tiny_models import tiny_model

from rk_export import Recipe, compress
from rk_export.calibration import self_text
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import RankRule
from rk_export.options.run import Run
from rk_export.passes.numerics.eigen import leading_eigenvectors
from rk_export.passes.numerics.metric import Metric, conditional_variances
from rk_export.passes.numerics.threads import cpu_threads, total

SHORT = CalibrationOptions(tokens=512)
RECIPES: dict[str, Callable[[], Recipe]] = {
    "formats": lambda: Recipe.load("default"),
    "pairs": lambda: made_recipe(calibration=SHORT, rank=RankRule("keep", 0.7)),
}


def one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the model write its text on one thread: few rows in bfloat16 depend on it (docs/how-to/use-workers.md)."""
    sample = self_text.sample_text

    def on_one_thread(*given: Any) -> torch.Tensor:
        with cpu_threads(1):
            return sample(*given)

    monkeypatch.setattr(self_text, "sample_text", on_one_thread)


@pytest.mark.whole
@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_one_and_two_threads_make_the_same_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one_text(monkeypatch)
    # Large enough for factorizations to be split: those of 96 columns are not.
    shape = {"hidden_size": 320, "intermediate_size": 640}
    tiny_model("llama", bos_token_id=1, **shape).save_pretrained(tmp_path / "model")
    for threads in (1, 2):
        monkeypatch.setattr("rk_export.tensor_cache.CACHE", tmp_path / f"cache {threads}")
        with cpu_threads(threads), threadpool_limits(threads, user_api="blas"):
            out = tmp_path / str(threads)
            compress(tmp_path / "model", out, RECIPES[name](), run=Run("cpu", threads))
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one.keys() == two.keys()
    assert [path for path in one if one[path] != two[path]] == []


def _moment(size: int) -> torch.Tensor:
    rows = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0))
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize(
    "work",
    [
        lambda: Metric.of(_moment(512)).roots[0],
        lambda: conditional_variances(_moment(512)),
        lambda: leading_eigenvectors(_moment(300).double(), 40)[1],
        lambda: Metric.of(_moment(512)).unweighted(_moment(512)),
        lambda: total(_moment(512)),
    ],
    ids=["metric", "variances", "eigenvectors", "solve", "total"],
)
def test_numerics_give_the_same_bytes_on_one_and_two_threads(work: Callable[[], torch.Tensor]) -> None:
    found = []
    for threads in (1, 2):
        with cpu_threads(threads), threadpool_limits(threads, user_api="blas"):
            found.append(work())
    assert torch.equal(found[0], found[1])
