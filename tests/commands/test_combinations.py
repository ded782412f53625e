"""Any two methods in one plan: a verified bundle, or a refusal before work begins. The table in the docs is made here.

RK_UPDATE_DOCS=1 pytest tests/commands/test_combinations.py      writes docs/reference/combinations.md anew
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rk_export.commands.compress import compress
from rk_export.commands.plan import make_plan
from rk_export.errors import InputError
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.prune.options import PruneOptions
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.ranks import Budget, RankRule
from rk_export.options.recipe import Recipe
from rk_export.options.texts import TextFile

pytestmark = pytest.mark.whole

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "combinations.md"
INT4, INT8 = QuantSpec(4, 32), QuantSpec(8, 32)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        title: As the docs call it.
        command: How the command line asks for it.
        fields: Of `Recipe`.
        prunes: Fields of `PruneOptions`, which two methods may share.
    """

    title: str
    command: str
    fields: dict[str, Any]
    prunes: dict[str, Any]


def methods(task: Path) -> list[Method]:
    basel = BaselOptions(TextFile.of(task), steps=4, batch_tokens=128, new_basis=4, events=2)
    cap = CapOptions(steps=2, batch_tokens=128)
    return [
        Method(
            "joint rank",
            "--groups qk,gate_up --keep 0.8 --uniform",
            {"groups": ("qk", "gate_up"), "rank": RankRule("keep", 0.8)},
            {},
        ),
        Method(
            "Basel", "--method basel --keep 0.8", {"rank": RankRule("keep", 0.8), "methods": (basel,)}, {}
        ),
        Method("CAP", "--method cap --keep 0.6", {"budget": Budget("keep", 0.6), "methods": (cap,)}, {}),
        Method("FFN width", "--prune-ffn 0.75", {}, {"ffn": 0.75}),
        Method("heads", "--prune-heads 1", {}, {"kv_groups": 1}),
        Method("blocks", "--prune-blocks 1", {}, {"blocks": 1}),
        Method("INT8", "--bits 8", {"quant": INT8}, {}),
        Method("INT4", "--bits 4", {"quant": INT4}, {}),
        Method("W8A8", "--activations 8", {"quant": W8A8}, {}),
        Method("error correction", "--bits 4 --correction 4", {"quant": INT4, "correction": 4}, {}),
    ]


def options_of(one: Method, other: Method) -> Recipe:
    """Return the options of two methods together; of two formats the second takes every other matrix, see `run`."""
    prunes = {**one.prunes, **other.prunes}
    fields = {**one.fields, **other.fields}
    pruning = (PruneOptions(**prunes),) if prunes else ()
    rows = (one,) if one is other else (one, other)
    fields["methods"] = (*pruning, *(method for row in rows for method in row.fields.get("methods", ())))
    return Recipe(
        **{
            "groups": (),
            "quant": None,
            "embedding_quant": None,
            "prepare": (),
            "calibration": CalibrationOptions(tokens=512),
            **fields,
        }
    )


def run(model: Path, out: Path, one: Method, other: Method) -> str:
    """Compress with two methods and return an empty string, or the reason of the refusal.

    Parity that fails, and every error that is not ours, is raised.
    """
    try:
        options = options_of(one, other)
        formats = [item.fields["quant"] for item in (one, other) if "quant" in item.fields]
        if len(set(formats)) < 2:
            compress(model, out, options)
            return ""
        plan = make_plan(model, options)
        sites = tuple(
            replace(site, quant=formats[number % 2], correction=_correction(one, other, formats[number % 2]))
            for number, site in enumerate(plan.sites)
        )
        compress(model, out, plan=replace(plan, sites=sites))
    except InputError as error:
        return f"{error.where}: {error.what}"
    return ""


def _correction(one: Method, other: Method, quant: QuantSpec) -> int:
    wanted = one.fields.get("correction", 0) or other.fields.get("correction", 0)
    return wanted if quant == INT4 else 0


_INTRODUCTION = (
    "Two methods can work on one model. This page says which pairs do:",
    "",
    "- `yes` means that a tiny Llama was compressed with both methods and exported, and every bounded tier of",
    "  [parity](parity.md) passed. Its weights are random, so it does not say how good the result is.",
    "- A number means that the pair is refused before any work begins. The reason stands below the table.",
    "- Where row and column are the same, the method works alone.",
    "- Two formats share a model matrix by matrix: every other matrix has the second format.",
    "",
    "`tests/commands/test_combinations.py` tries every pair and writes this page (`RK_UPDATE_DOCS=1`). It fails when",
    "the page is not what it finds.",
)


def page(rows: list[Method], outcomes: dict[tuple[str, str], str]) -> str:
    """Return the docs page: the table of outcomes, the reasons of refusals, and how each method is asked for."""
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
    lines += ["| method | how to ask for it |", "| --- | --- |"]
    lines += [f"| {row.title} | `{row.command}` |" for row in rows]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def outcomes(
    llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Method], dict[tuple[str, str], str]]:
    folder = tmp_path_factory.mktemp("combinations")
    task = folder / "task.txt"
    task.write_text(" ".join(f"{i} plus {i + 1} is {2 * i + 1}." for i in range(400)))
    rows = methods(task)
    found = {
        (one.title, other.title): run(llama, folder / f"{one.title}+{other.title}", one, other)
        for one, other in itertools.combinations_with_replacement(rows, 2)
    }
    return rows, found


def test_the_page_shows_what_happens(
    outcomes: tuple[list[Method], dict[tuple[str, str], str]],
) -> None:
    text = page(*outcomes)
    if os.environ.get("RK_UPDATE_DOCS"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text


def test_every_method_works_alone(outcomes: tuple[list[Method], dict[tuple[str, str], str]]) -> None:
    rows, found = outcomes
    assert [row.title for row in rows if found[row.title, row.title]] == []


@pytest.mark.parametrize("chosen", [("Basel", "INT4"), ("CAP", "INT8"), ("joint rank", "error correction")])
def test_all_pruning_goes_with_a_method_and_a_format(
    llama: Path,
    outcomes: tuple[list[Method], dict[tuple[str, str], str]],
    tmp_path: Path,
    chosen: tuple[str, ...],
) -> None:
    by_title = {row.title: row for row in outcomes[0]}
    fields = {name: value for title in chosen for name, value in by_title[title].fields.items()}
    fields["methods"] = (PruneOptions(1, 0.75, 1), *fields.get("methods", ()))
    options = replace(options_of(by_title["INT8"], by_title["INT8"]), **{"quant": None, **fields})
    report = compress(llama, tmp_path / "out", options)
    assert all(tier.passed is not False for tier in report.parity)


def test_selected_bases_take_the_identity_form(
    llama: Path, outcomes: tuple[list[Method], dict[tuple[str, str], str]], tmp_path: Path
) -> None:
    basel = next(row for row in outcomes[0] if row.title == "Basel")
    plain = options_of(basel, basel)
    sizes = []
    for name, options in (("plain", plain), ("identity", replace(plain, form="identity"))):
        report = compress(llama, tmp_path / name, options)
        assert report.size is not None
        sizes.append(report.size.kept_parameters)
    assert sizes[1] < sizes[0]
