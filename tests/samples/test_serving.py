"""The load test and the endurance test of the server, small: on a tiny bundle, for seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from measure import serve_load, serve_soak, speculation
from measure.harness import Results
from serving import write_decoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("bundles") / "tiny")


def test_load_is_measured_with_slots_and_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), "--clients", "3", "--requests", "2", "--threads", "1", "--out", str(tmp_path)]
    assert serve_load.main(words) == 0
    assert serve_load.main([*words, "--one-at-a-time"]) == 0
    results = Results(tmp_path, "serving")
    assert list(results.rows) == ["slots, 3 clients", "one at a time, 3 clients"]
    assert [row["slots"] for row in results.rows.values()] == [16, 1]
    for row in results.rows.values():
        assert (row["answers"], row["tokens"]) == (6, 6 * serve_load.NEW_TOKENS)
        assert 0 < row["first_p50_ms"] <= row["first_p99_ms"]
        assert 0 <= row["between_p50_ms"] <= row["between_p99_ms"]
    text = (tmp_path / "serving.md").read_text(encoding="utf-8")
    assert text == serve_load.page(results)
    assert "3 clients: slots give" in text


def test_the_figures_of_answers() -> None:
    found = [(0.1, [0.01, 0.03], 3), (0.3, [0.02], 2)]
    row = serve_load.summary(found, 2.0)
    assert (row["answers"], row["tokens"], row["tokens_per_second"]) == (2, 5, 2.5)
    assert (row["first_p50_ms"], row["between_p50_ms"]) == (pytest.approx(200), pytest.approx(20))


def test_endurance(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), "--minutes", "0.08", "--threads", "1", "--out", str(tmp_path)]
    serve_soak.main(words)  # memory still grows in the first seconds: the status may be 1
    (row,) = json.loads((tmp_path / "serving_soak.json").read_text())["rows"].values()
    assert row["wrong"] == []
    assert row["counts"]["streamed: 200"] > 0
    assert row["counts"]["whole: 200"] > 0
    assert row["rss_anon_end"] > 10e6


def test_endurance_notices_what_is_wrong() -> None:
    soak = serve_soak.Soak("", [], 1, 1, random.Random(0))
    soak.note("whole", 200, 200)
    soak.note("whole", 429, 200)
    assert soak.wrong == []
    soak.note("whole", 200, 200, "another answer")
    soak.note("bad", 500, 400)
    assert len(soak.wrong) == 2


def test_guesses_are_measured(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "tiny", context=2048)
    assert (
        speculation.main([str(bundle), "--draft", str(bundle), "--threads", "1", "--out", str(tmp_path)]) == 0
    )
    results = Results(tmp_path, "speculation")
    assert list(results.rows) == list(speculation.QUESTIONS)
    for row in results.rows.values():
        plain, lookup, draft = (
            row[way] for way in (speculation.PLAIN, speculation.LOOKUP, speculation.DRAFT)
        )
        assert (plain["ratio"], plain["drafted"], plain["equal_to_plain"]) == (1, 0, plain["answers"])
        assert 0 < lookup["accepted"] <= lookup["drafted"]
        assert 0 < draft["accepted"] <= draft["drafted"]
    assert (tmp_path / "speculation.md").read_text(encoding="utf-8") == speculation.page(results)
