"""Any two kinds of steps in one recipe: a verified bundle, or a refusal before work. The docs' table is made here.

RK_UPDATE_DOCS=1 pytest tests/commands/test_combinations.py      writes docs/reference/combinations.md anew
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rk_export.commands.compress import compress
from rk_export.errors import InputError
from rk_export.json_codec import MisfitError, read
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.prune.options import PruneOptions
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.recipe import Recipe
from rk_export.options.step import STAGES, Step

pytestmark = pytest.mark.whole

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "combinations.md"
# What the second of two formats takes; the first has the other matrices.
SECOND = ["k", "o", "up"]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        title: As the docs call it.
        steps: As a recipe has them.
        short: What makes a step short on a tiny model, by its name.
    """

    title: str
    steps: tuple[str, ...]
    short: dict[str, dict[str, Any]] = field(default_factory=dict)

    def data(self) -> list[tuple[str, dict[str, Any]]]:
        """Return name and fields of each step."""
        parsed = [next(iter(yaml.safe_load(step).items())) for step in self.steps]
        return [(name, {**fields, **self.short.get(name, {})}) for name, fields in parsed]


Outcomes = tuple[list[Row], dict[tuple[str, str], str]]


def rows_of(task: Path) -> list[Row]:
    basel = {"target": str(task), "steps": 4, "batch_tokens": 128, "new_basis": 4, "events": 2}
    return [
        Row("joint rank", ("factorize: {groups: [qk, gate_up], keep: 0.8}",)),
        Row("Basel", ("basel: {target: task.txt, keep: 0.8}",), {"basel": basel}),
        Row("CAP", ("cap: {keep: 0.6}",), {"cap": {"steps": 2, "batch_tokens": 128}}),
        Row("FFN width", ("prune: {ffn_keep: 0.75}",)),
        Row("heads", ("prune: {kv_heads_keep: 1}",)),
        Row("blocks", ("prune: {blocks: 1}",)),
        Row("INT8", ("quantize: {bits: 8}",)),
        Row("INT4", ("quantize: {bits: 4}",)),
        Row("W8A8", ("quantize: {bits: 8, activations: 8}",)),
        Row("error correction", ("quantize: {bits: 4}", "correct: {rank: 4}")),
    ]


def recipe_of(*rows: Row) -> Recipe:
    """Return the recipe of some rows: pruning is one step, and of two formats the second takes some matrices.

    Raises:
        InputError: They do not go together.
    """
    steps: list[tuple[str, dict[str, Any]]] = []
    # What is corrected is the format of most matrices.
    for name, fields in [
        step for row in sorted(rows, key=lambda row: -len(row.steps)) for step in row.data()
    ]:
        own = next((known for kind, known in steps if kind == name), None)
        if name == "quantize" and own is not None and own != fields:
            steps.append((name, {**fields, "targets": SECOND}))
        elif own is not None:
            own.update(fields)
        else:
            steps.append((name, fields))
    try:
        read_steps = [read(Step, {name: fields}) for name, fields in steps]
    except MisfitError as error:
        raise error.cause or error from error
    read_steps.sort(key=lambda step: STAGES.index(step.stage))
    return Recipe(tuple(read_steps), CalibrationOptions(tokens=512))


def run(model: Path, out: Path, one: Row, other: Row) -> str:
    """Compress with two rows and return an empty string, or the reason of the refusal.

    Parity that fails, and every error that is not ours, is raised.
    """
    try:
        compress(model, out, recipe_of(*((one,) if one is other else (one, other))))
    except InputError as error:
        return f"{error.where}: {error.what}"
    return ""


_INTRODUCTION = (
    "Two kinds of [steps](recipes.md) can stand in one recipe. This page says which pairs do:",
    "",
    "- `yes` means that a tiny Llama was compressed with both and exported, and every bounded tier of",
    "  [parity](parity.md) passed. Its weights are random, so it does not say how good the result is.",
    "- A number means that the pair is refused before any work begins. The reason stands below the table.",
    "- Where row and column are the same, the step works alone.",
    "- Two formats share a model: the second one takes the matrices `k`, `o` and `up`.",
    "",
    "`tests/commands/test_combinations.py` tries every pair and writes this page (`RK_UPDATE_DOCS=1`). It fails when",
    "the page is not what it finds.",
)


def page(rows: list[Row], outcomes: dict[tuple[str, str], str]) -> str:
    """Return the docs page: the table of outcomes, the reasons of refusals, and the steps of each row."""
    reasons = list(dict.fromkeys(reason for reason in outcomes.values() if reason))
    names = [row.title for row in rows]
    lines = [
        "# Combinations",
        "",
        *_INTRODUCTION,
        "",
        "| | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for row in names:
        cells = []
        for column in names:
            outcome = outcomes[(row, column) if (row, column) in outcomes else (column, row)]
            cells.append("yes" if not outcome else str(reasons.index(outcome) + 1))
        lines.append(f"| **{row}** | " + " | ".join(cells) + " |")
    lines += ["", "Why a pair is refused:", ""]
    lines += [*[f"{number}. {reason}" for number, reason in enumerate(reasons, 1)], ""]
    lines += ["| row | steps |", "| --- | --- |"]
    for row in rows:
        lines.append(f"| {row.title} | " + ", ".join(f"`{step}`" for step in row.steps) + " |")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def outcomes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = tmp_path_factory.mktemp("combinations")
    task = folder / "task.txt"
    task.write_text(" ".join(f"{i} plus {i + 1} is {2 * i + 1}." for i in range(400)))
    rows = rows_of(task)
    found = {
        (one.title, other.title): run(llama, folder / f"{one.title}+{other.title}", one, other)
        for one, other in itertools.combinations_with_replacement(rows, 2)
    }
    return rows, found


def test_the_page_shows_what_happens(
    outcomes: Outcomes,
) -> None:
    text = page(*outcomes)
    if os.environ.get("RK_UPDATE_DOCS"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text


def test_every_step_works_alone(outcomes: Outcomes) -> None:
    rows, found = outcomes
    assert [row.title for row in rows if found[row.title, row.title]] == []


@pytest.mark.parametrize("chosen", [("Basel", "INT4"), ("CAP", "INT8"), ("joint rank", "error correction")])
def test_all_pruning_goes_with_a_method_and_a_format(
    llama: Path, outcomes: Outcomes, tmp_path: Path, chosen: tuple[str, ...]
) -> None:
    recipe = recipe_of(*(row for row in outcomes[0] if row.title in chosen))
    report = compress(llama, tmp_path / "out", recipe.with_step(PruneOptions(1, 0.75, 1)))
    assert all(tier.passed is not False for tier in report.parity)


def test_selected_bases_take_the_identity_form(llama: Path, outcomes: Outcomes, tmp_path: Path) -> None:
    plain = recipe_of(next(row for row in outcomes[0] if row.title == "Basel"))
    basel = plain.find(BaselOptions)
    assert basel is not None
    sizes = []
    for form in ("plain", "identity"):
        report = compress(llama, tmp_path / form, plain.with_step(replace(basel, form=form)))
        assert report.size is not None
        sizes.append(report.size.kept_parameters)
    assert sizes[1] < sizes[0]
