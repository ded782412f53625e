"""Scores of several models as one table and as JSON, with the differences to the first model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rk_export.evaluation.models import ModelScores, short_names
from rk_export.evaluation.multiple_choice import TaskResult, mean_and_error
from rk_export.evaluation.perplexity import PerplexityResult, paired_perplexity
from rk_export.report.table import Column, Table, make_table

_PAIRED = {"acc": "right", "acc_norm": "right_norm"}  # measure -> answers to the single items


def paired_difference(mine: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float]:
    """Return the difference of two accuracies on the same items, and its standard error.

    Where both answer most items alike, as a model and its compressed form do, it is below the errors of the two.
    """
    return mean_and_error([int(a) - int(b) for a, b in zip(mine, theirs, strict=True)])


def score_table(scores: Sequence[ModelScores]) -> Table:
    """One row a measure, one column a model, ± one standard error; then what it is less that of the first model."""
    names = short_names([one.model for one in scores])
    columns = [Column("on"), Column("measure"), *(Column(name, "number") for name in names)]
    columns += [Column(f"{name} − {names[0]}", "number") for name in names[1:]]
    return make_table(columns, [*_text_rows(scores), *_task_rows(scores)])


def _text_rows(scores: Sequence[ModelScores]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            "perplexity",
            *(_plus_minus(one.texts[name].perplexity, one.texts[name].perplexity_error) for one in scores),
            *(_perplexity_difference(one.texts[name], scores[0].texts[name]) for one in scores[1:]),
        )
        for name in scores[0].texts
    ]


def _perplexity_difference(mine: PerplexityResult, theirs: PerplexityResult) -> str:
    paired = paired_perplexity(mine, theirs)
    return "" if paired is None else _plus_minus(*paired, sign="+")


def _task_rows(scores: Sequence[ModelScores]) -> list[tuple[str, ...]]:
    rows = []
    for name, first in scores[0].tasks.items():
        title = f"{name} ({first.items} items)"
        results = [one.tasks[name] for one in scores]
        for measure in ("acc", "acc_norm", "perplexity"):
            values = [(getattr(one, measure), getattr(one, f"{measure}_error")) for one in results]
            if values[0][0] is not None:
                differences = [_difference(one, first, measure) for one in results[1:]]
                rows.append((title, measure, *(_plus_minus(*pair) for pair in values), *differences))
                title = ""
    return rows


def _difference(mine: TaskResult, theirs: TaskResult, measure: str) -> str:
    if measure not in _PAIRED:
        return ""
    value, error = paired_difference(*(getattr(result, _PAIRED[measure]) for result in (mine, theirs)))
    return _plus_minus(value, error, sign="+")


def _plus_minus(value: float, error: float, sign: str = "") -> str:
    shown = f"{value:{sign}.3f}" if abs(value) < 1e5 else f"{value:{sign}.3e}"
    return (
        shown if math.isnan(error) else f"{shown} ± {error:.3f}" if error < 1e5 else f"{shown} ± {error:.1e}"
    )


def scores_json(scores: Sequence[ModelScores]) -> list[dict[str, Any]]:
    """Return plain data, not-a-number as None; from the second model on with the differences to the first."""
    return [
        {
            "model": one.model,
            "texts": {
                name: _text_json(result) | (_text_difference(result, scores[0].texts[name]) if index else {})
                for name, result in one.texts.items()
            },
            "tasks": {
                name: _task_json(result) | (_differences(result, scores[0].tasks[name]) if index else {})
                for name, result in one.tasks.items()
            },
        }
        for index, one in enumerate(scores)
    ]


def _text_json(result: PerplexityResult) -> dict[str, Any]:
    fields = asdict(result)
    return _finite({name: value for name, value in fields.items() if not name.startswith("window_")})


def _text_difference(mine: PerplexityResult, theirs: PerplexityResult) -> dict[str, Any]:
    value, error = paired_perplexity(mine, theirs) or (None, None)
    return _finite({"perplexity_difference": value, "perplexity_difference_error": error})


def _task_json(result: TaskResult) -> dict[str, Any]:
    fields = asdict(result)
    return _finite({name: value for name, value in fields.items() if name not in _PAIRED.values()})


def _differences(mine: TaskResult, theirs: TaskResult) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for measure, attribute in _PAIRED.items():
        answers = getattr(mine, attribute), getattr(theirs, attribute)
        value, error = paired_difference(*answers) if answers[0] else (None, None)
        fields |= {f"{measure}_difference": value, f"{measure}_difference_error": error}
    return _finite(fields)


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with None for numbers that JSON does not know."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }
