"""Budgets: which amounts there are, how they are written, and sizes in text."""

from __future__ import annotations

from typing import Any

import pytest

from rk_export.errors import InputError
from rk_export.json_codec import MisfitError, read, to_json
from rk_export.options.ranks import BUDGET_KINDS, Budget, BudgetKind, bytes_of


@pytest.mark.parametrize(
    ("kind", "value", "phase"),
    [("keep", 1.0, "decode"), ("keep", 0, "decode"), ("size", 0, "decode"), ("size", -3, "decode"),
     ("size", float("inf"), "decode"), ("size", "int8", "decode"), ("keep", "int4", "decode"),
     ("mean_bits", 1.5, "decode"), ("mean_bits", 17, "decode"), ("mean_bits", float("nan"), "decode"),
     ("speed_up", 1.0, "decode"), ("speed_up", 2, "both"), ("keep", 0.5, "prefill"), ("bits", 4, "decode")],
)  # fmt: skip
def test_impossible_budgets(kind: Any, value: Any, phase: Any) -> None:
    with pytest.raises(InputError) as caught:
        Budget(kind, value, phase)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("budget", "data"),
    [
        (Budget("keep", 0.9), {"keep": 0.9}),
        (Budget("size", 9e7), {"size": 90_000_000}),
        (Budget("size", "int4"), {"size": "int4"}),
        (Budget("mean_bits", 4.5), {"mean_bits": 4.5}),
        (Budget("speed_up", 1.8, "prefill"), {"speed_up": 1.8, "phase": "prefill"}),
    ],
)
def test_a_budget_reads_what_it_writes(budget: Budget, data: dict[str, Any]) -> None:
    assert to_json(budget) == data
    assert read(Budget, data) == budget


@pytest.mark.parametrize(
    "data", [{}, {"keep": 0.9, "size": 1e6}, {"phase": "prefill"}, {"bits": 4}, {"keep": "0.9"}, 3]
)
def test_what_is_no_single_amount_is_refused(data: Any) -> None:
    with pytest.raises(MisfitError):
        read(Budget, data)


@pytest.mark.parametrize("kind", BUDGET_KINDS)
def test_a_budget_knows_its_flag_and_its_name(kind: BudgetKind) -> None:
    budget = Budget(kind, 0.5 if kind == "keep" else 3)
    assert budget.flag == f"--{kind.replace('_', '-')}"
    assert "_" not in budget.name
    assert budget.amount == budget.value


def test_the_size_of_plain_int4_is_no_number_without_a_model() -> None:
    with pytest.raises(ValueError, match="known with the model only"):
        _ = Budget("size", "int4").amount


@pytest.mark.parametrize(("text", "size"), [("90MB", 9e7), ("1.5 gb", 1.5e9), ("300k", 3e5), ("42", 42)])
def test_sizes(text: str, size: float) -> None:
    assert bytes_of(text) == size
    assert read(Budget, {"size": text}) == Budget("size", size)


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "ten", "1TB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match="is no size"):
        bytes_of(text)
