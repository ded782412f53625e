"""The page on encoders: its Python and its commands run as they stand, on tiny bundles of the names that it uses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import Cli
from encoder_bundles import write_classifier, write_embedding_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "embed.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python" and "rk_export" in text]
RUNS = [
    line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if " run " in line
]


@pytest.fixture(autouse=True)
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_embedding_model(tmp_path / "out" / "minilm")
    write_classifier(tmp_path / "out" / "reranker", labels=1)
    for name in ("minilm", "reranker"):  # the tiny models have 16 positions, and the page's texts are longer
        path = tmp_path / "out" / name / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(values | {"max_position_embeddings": 64}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[2][:30])
def test_python_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "embed.md", "exec"), {})  # noqa: S102 (it is our own page)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", RUNS)
def test_commands_run(cli: Cli, line: str) -> None:
    ended = cli(*shlex.split(line)[1:], "--provider", "cpu", "--threads", 1)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out


def test_the_page_shows_both_kinds_of_model() -> None:
    assert len(PYTHON) == 2
    assert len(RUNS) == 2


def test_make_targets_that_it_names_are_there() -> None:
    named = set(re.findall(r"`make ([\w-]+)`", PAGE))
    assert named == {"test-optimum", "test-sentence-transformers"}
    assert all(re.search(rf"^{name}:", MAKEFILE, re.MULTILINE) for name in named)
