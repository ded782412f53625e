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
from fetched import wiki_text

pytestmark = pytest.mark.real_model

TEXT = ("--tokens", 5120, "--context", 512)


@dataclass(frozen=True)
class Row:
    """A command line of `compress` and what it was measured to give.

    Args:
        arguments: Of the command.
        perplexity: What was measured.
        megabytes: Of model.onnx.data, as measured; None where floats fill it.
        within: Relative bound on both sides of the perplexity.
    """

    arguments: tuple[object, ...]
    perplexity: float
    megabytes: float | None = None
    within: float = field(default=0.025)


ROWS = {
    "90 MB": Row(("--size", "90MB"), 24.23, 89.6),
    "W8A8": Row(("--activations", 8), 22.59, 137.4, within=0.01),
    "0.8 kept, floats": Row(("--keep", 0.8, "--bits", 16), 33.61),
    # Wanda's entries: the one selector of CAP that takes seconds.
    "CAP, 0.5 kept": Row(("--method", "cap", "--keep", 0.5, "--selector", "wanda"), 55.77, 271.2),
}


def check(cli: Cli, row: Row, bundle: Path) -> None:
    """Measure a bundle and compare it with what its row says."""
    ended = cli("eval", bundle, "--text", wiki_text("eval"), *TEXT, "--threads", 1, "--json")
    assert json.loads(ended.out)["perplexity"] == pytest.approx(row.perplexity, rel=row.within), ended.err
    if row.megabytes is not None:
        megabytes = (bundle / "model.onnx.data").stat().st_size / 1e6
        assert megabytes == pytest.approx(row.megabytes, rel=0.01)


def test_the_default(cli: Cli, smollm2_int4: Path) -> None:
    check(cli, Row((), 24.85, 90.3), smollm2_int4)


@pytest.mark.parametrize("name", ROWS)
def test_options(cli: Cli, off_grid: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    ended = cli("compress", off_grid, "-o", out, *ROWS[name].arguments, "--threads", 1)
    assert ended.code == 0, ended.err
    check(cli, ROWS[name], out)
    shutil.rmtree(out)  # up to half a gigabyte
