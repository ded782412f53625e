"""What compression costs SmolLM2-135M-Instruct, held from both sides: worse is a fault, better is to be looked at too.

Perplexity of wiki_eval.txt, its first 5120 tokens in windows of 512, through ONNX Runtime, as in docs/results. The
weights are moved off the 4-bit grid that the packaged checkpoint lies on; all rows share that model and the text it
writes itself for calibration. Dense: 22.48.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import Cli
from fetched import smollm2, wiki_text

from rk_export.commands.pipeline import prepare

pytestmark = pytest.mark.real_model

TEXT = ("--tokens", 5120, "--context", 512)


@dataclass(frozen=True)
class Row:
    """A command line of `compress` and what it was measured to give.

    Args:
        arguments: Of the command.
        perplexity: What was measured.
        megabytes: Of model.onnx.data, as measured.
        within: Relative bound on both sides of the perplexity.
    """

    arguments: tuple[object, ...]
    perplexity: float
    megabytes: float
    within: float = field(default=0.025)


ROWS = {
    "INT4, the default": Row((), 24.0, 86.5),
    "90 MB": Row(("--size", "90MB"), 24.0, 90),
    "W8A8": Row(("--activations", 8), 22.7, 140),
    "0.8 kept, floats": Row(("--keep", 0.8, "--bits", 16), 31.3, 500),
    # Wanda's entries: the one selector of CAP that takes seconds.
    "CAP, 0.5 kept": Row(("--method", "cap", "--keep", 0.5, "--selector", "wanda"), 56.0, 500),
}


@pytest.fixture(scope="module")
def off_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with the same logits and other weights, on which quantizers differ."""
    folder = tmp_path_factory.mktemp("models") / "off-grid"
    prepare(smollm2(), folder, seed=7)
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_perplexity(cli: Cli, off_grid: Path, tmp_path: Path, name: str) -> None:
    row, out = ROWS[name], tmp_path / "out"
    ended = cli("compress", off_grid, "-o", out, *row.arguments, "--threads", 2)
    assert ended.code == 0, ended.err
    megabytes = (out / "model.onnx.data").stat().st_size / 1e6
    measured = json.loads(cli("eval", out, "--text", wiki_text("eval"), *TEXT, "--threads", 2, "--json").out)
    shutil.rmtree(out)  # up to half a gigabyte
    assert measured["perplexity"] == pytest.approx(row.perplexity, rel=row.within)
    assert megabytes == pytest.approx(row.megabytes, rel=0.01)
