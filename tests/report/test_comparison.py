"""Models side by side: tables, the page, and what differs."""

from __future__ import annotations

import json

import pytest
from page_reader import PageReader
from sample_report import parity_tiers

from rk_export.report.comparison import Compared, Comparison, MatrixChoice, Score
from rk_export.report.comparison_page import comparison_blocks, comparison_html
from rk_export.report.comparison_tables import (
    matrices_table,
    overview_table,
    parity_table,
    plus_minus,
    roles_table,
)
from rk_export.report.definitions import definition_of
from rk_export.report.records import LayerError, SizeSummary
from rk_export.report.table import plain_text

HOSTILE = "<script>alert('x')</script>\x1b[2J"
ALIKE = MatrixChoice("o", "dense", bits=4, block=32, activations=16, errors=(0.08,))
JOINT = MatrixChoice("q", "joint", ("k",), 24, 0, 4, 32, 16, (0.54, 0.12))
FLOATS = MatrixChoice("q", "dense")
SPARSE = MatrixChoice("q", "sparse", (), 8, 1200, 8, 64, 8, (0.2,))


def bundle(name: str, size: int, value: float, choice: MatrixChoice) -> Compared:
    return Compared(
        name,
        "bundle",
        made_from="example/tiny",
        file_bytes=size,
        size=SizeSummary(1000, 900, 4000, 1000, size),
        scores=(
            Score("prose.txt", "perplexity", value, 0.5, value - 22.5, 0.1),
            Score("trivia", "acc", 0.5, None),
        ),
        speed={"prefill": 900.0, "decode": 64.2},
        parity=parity_tiers(),
        layer_errors=(LayerError(0, 0.1, 0.2), LayerError(1, 0.2, 0.3)),
        layer_bytes={"0": 500, "1": 700},
        matrices={"layers.0.q": choice, "layers.0.o": ALIKE},
    )


DENSE = Compared("dense", "model", file_bytes=4000, scores=(Score("prose.txt", "perplexity", 22.5, 0.4),))
FULL = Comparison(
    (DENSE, bundle("small", 1000, 26.0, JOINT), bundle("large", 2000, 23.0, FLOATS)),
    command="rk-export compare dense small large",
)


def cells(name: str) -> tuple[str, ...]:
    return next(row[1:] for row in overview_table(FULL).rows if row[0] == name)


def test_the_overview_has_a_row_a_measure_and_a_column_a_model() -> None:
    assert [column.title for column in overview_table(FULL).columns] == ["measure", "dense", "small", "large"]
    assert cells("files") == ("4.00 kB", "1.00 kB", "2.00 kB")
    assert cells("perplexity on prose.txt") == ("22.500 ± 0.400", "26.000 ± 0.500", "23.000 ± 0.500")
    assert cells("difference to dense") == ("–", "+3.500 ± 0.100", "+0.500 ± 0.100")
    assert cells("acc on trivia") == ("–", "0.500", "0.500")
    assert cells("decode tok/s") == ("–", "64.2", "64.2")
    assert cells("parity passed") == ("–", "1 of 2", "1 of 2")


def test_rows_of_the_overview_have_a_meaning() -> None:
    assert {row[0] for row in overview_table(FULL).rows if definition_of(row[0]) is None} == {"made from"}


def test_parity_keeps_every_tier_that_some_model_has() -> None:
    rows = parity_table(FULL.models).rows
    assert [row[0] for row in rows] == ["a", "c", "f"]
    assert rows[1][2:] == ("pass 4.95e-6", "pass 4.95e-6")  # the dense model has no column: it has no tiers


def test_only_matrices_that_differ_are_listed() -> None:
    assert set(FULL.differing) == {"layers.0.q"}
    (row,) = matrices_table(FULL).rows
    assert row == (
        "layers.0.q",
        "joint with k, rank 24, INT4 in blocks of 32",
        "0.540, 0.120",
        "dense, floats",  # nothing was changed, so the column of errors has nothing to show
    )


def test_a_matrix_that_one_model_lacks_differs() -> None:
    pruned = Compared("pruned", "bundle", matrices={"layers.0.o": ALIKE})
    comparison = Comparison((bundle("whole", 1, 2.0, JOINT), pruned))
    assert comparison.differing == {"layers.0.q": (JOINT, None)}


def test_choices_are_told_in_words() -> None:
    assert SPARSE.choice == "sparse, rank 8, 1,200 entries, INT8 in blocks of 64, INT8 inputs"
    assert MatrixChoice("q", "per_head", ("k",), 4).choice == "per head with k, rank 4, floats"


def test_roles_are_told_in_short() -> None:
    other = MatrixChoice("q", "joint", ("k",), 40, bits=8, block=32, errors=(0.1,))
    mixed = Compared("mixed", "bundle", matrices={"layers.0.q": JOINT, "layers.1.q": other})
    assert roles_table([mixed]).rows == (("q", "joint, rank 24-40, INT4/INT8, error up to 0.540"),)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (25.2131, 0.1, "25.213 ± 0.100"),
        (25.0, None, "25.000"),
        (1.0, float("nan"), "1.000"),
        (2e7, None, "2.000e+07"),
    ],
)
def test_values_have_their_errors(value: float, error: float | None, shown: str) -> None:
    assert plus_minus(value, error) == shown


def test_the_terminal_gets_overview_and_choices() -> None:
    text = plain_text(comparison_blocks(FULL))
    assert "difference to dense" in text
    assert "joint, rank 24, INT4, error up to 0.540" in text


def test_the_page_shows_every_part_and_loads_nothing() -> None:
    page = comparison_html(FULL)
    reader = PageReader(page)
    assert "dense, small and large" in reader.text
    for anchor in ("overview", "quality", "parity", "roles", "layers", "matrices", "reproduce", "meaning"):
        assert ("id", anchor) in reader.attributes
    assert "1 of 2 matrices are not treated alike" in reader.text
    assert reader.tags.count("img") == 4  # perplexity, accuracy, bytes and errors of the layers
    links = [value for name, value in reader.attributes if name == "href"]
    assert all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} <= {value for name, value in reader.attributes if name == "id"}
    assert comparison_html(FULL) == page


def test_models_without_anything_to_tell_make_no_empty_parts() -> None:
    reader = PageReader(
        comparison_html(Comparison((Compared("a", "model", file_bytes=1), Compared("b", "model"))))
    )
    assert "parity" not in {value for name, value in reader.attributes if name == "id"}


def test_hostile_names_are_text() -> None:
    hostile = Comparison((bundle(HOSTILE, 1, 2.0, JOINT), bundle("b", 1, 2.0, SPARSE)), HOSTILE)
    reader = PageReader(comparison_html(hostile))
    assert "script" not in reader.tags
    assert "\x1b" not in plain_text(comparison_blocks(hostile))


def test_json_holds_what_the_page_shows() -> None:
    data = json.loads(json.dumps(FULL.to_json()))
    assert data["models"][1]["matrices"]["layers.0.q"]["rank"] == 24
    assert data["models"][1]["scores"][0]["difference_error"] == 0.1
