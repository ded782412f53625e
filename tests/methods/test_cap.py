"""From a budget to parts: all selectors end to end, and budgets that are refused before the search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_plans import cost_of
from torch import Tensor

from rk_export.calibration.sensitivity import dense_statistics
from rk_export.errors import InputError
from rk_export.methods.cap import pools as cap_pools
from rk_export.methods.cap.choose import cap_parts, check_pools
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.cap.pools import flat_prices, make_pools
from rk_export.methods.sparse_sites import BYTES, PARAMETERS, Prices, amount_of, linear_shapes, over_dense
from rk_export.options.ranks import Budget
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.source.stored import StoredModel

SourceOf = Callable[..., StoredModel]
CPU = torch.device("cpu")


def _tokens(source: StoredModel) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, source.config.vocab_size, (6, 16), generator=generator)


def _chosen(source: StoredModel, folder: Path, budget: Budget, **options: Any) -> dict[Any, Parts]:
    tokens = _tokens(source)
    statistics = dense_statistics(source, tokens, diagonal=False, device=CPU, cache_dir=folder)
    return cap_parts(
        source,
        budget,
        CapOptions(keep=0.5, steps=3, batch_tokens=32, **options),
        tokens=tokens,
        statistics=statistics,
        device=CPU,
        cache_dir=folder,
    )


@pytest.mark.parametrize("selector", ["policy", "pools", "auction", "wanda", "magnitude"])
@pytest.mark.parametrize("kind", ["keep", "size"])
def test_parts_of_every_matrix_within_the_budget(
    source_of: SourceOf, tmp_path: Path, selector: str, kind: Any
) -> None:
    source = source_of("llama")
    shapes = linear_shapes(source)
    numbers = sum(rows * columns for rows, columns in shapes.values())
    amount, prices = (0.5 * numbers, PARAMETERS) if kind == "keep" else (1.2 * numbers, BYTES)
    parts = _chosen(source, tmp_path, Budget(kind, 0.5 if kind == "keep" else amount), selector=selector)
    assert {place: item.shape for place, item in parts.items()} == shapes
    total = sum(cost_of(item, prices) for item in parts.values())
    assert 0.97 * amount < total <= amount
    assert any(item.rank for item in parts.values()) == (selector not in ("wanda", "magnitude"))
    assert any(item.entries for item in parts.values())
    again = _chosen(
        source, tmp_path / "again", Budget(kind, 0.5 if kind == "keep" else amount), selector=selector
    )
    assert all(torch.equal(item.dense(), again[place].dense()) for place, item in parts.items())


def test_other_families_have_their_own_matrices(source_of: SourceOf, tmp_path: Path) -> None:
    parts = _chosen(source_of("gpt2"), tmp_path, Budget("keep", 0.6))
    assert (1, "attn.c_attn.q_proj") in parts


@pytest.mark.parametrize(
    ("budget", "where", "message"),
    [
        (Budget("mean_bits", 4), "--mean-bits", "no price in mean bits"),
        (Budget("speed_up", 2), "--speed-up", "no price in speed-up"),
        (Budget("size", 1e12), "--size", "which the budget holds"),
        (Budget("size", 2.9), "--size", "keeps nothing"),
        (Budget("keep", 1e-9), "--keep", "keeps nothing"),
    ],
)
def test_budgets_that_make_no_sense_are_refused_before_work(
    source_of: SourceOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    budget: Budget,
    where: str,
    message: str,
) -> None:
    monkeypatch.setattr(cap_pools, "rpca", None)
    source = source_of("llama")
    with pytest.raises(InputError, match=message) as refused:
        cap_parts(
            source,
            budget,
            CapOptions(keep=0.5),
            tokens=_tokens(source),
            statistics=None,
            device=CPU,
            cache_dir=tmp_path,
        )
    assert refused.value.where == where


def test_a_budget_that_holds_all_candidates_leaves_nothing_to_choose(
    source_of: SourceOf, tmp_path: Path
) -> None:
    source = source_of("llama")
    pools = make_pools(source, 5, CPU, tmp_path)
    total = float(flat_prices(pools, PARAMETERS).sum())
    check_pools(pools, total - 1, Budget("keep", 0.5), PARAMETERS)
    with pytest.raises(InputError, match="nothing to choose"):
        check_pools(pools, total, Budget("keep", 0.5), PARAMETERS)


def test_selectors_ask_for_what_they_need(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    for selector, missing in (("policy", "text"), ("auction", "statistics")):
        options = CapOptions(keep=0.5, selector=selector)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=missing):
            cap_parts(
                source,
                Budget("keep", 0.5),
                options,
                tokens=None,
                statistics=None,
                device=CPU,
                cache_dir=tmp_path,
            )


def test_amounts_and_prices(source_of: SourceOf) -> None:
    source = source_of("llama")
    numbers = sum(rows * columns for rows, columns in linear_shapes(source).values())
    assert amount_of(source, Budget("keep", 0.25)) == (0.25 * numbers, PARAMETERS)
    assert amount_of(source, Budget("size", 1000)) == (1000, BYTES)
    assert amount_of(source, Budget("size", 1000), Prices(1, 2, 1)) == (1000, Prices(1, 2, 1))


def test_matrices_dearer_than_dense_are_found() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    full = Parts(torch.zeros(4, 3), torch.zeros(3, 4), none, torch.zeros(0))
    small = Parts(torch.zeros(4, 2), torch.zeros(2, 4), none, torch.zeros(0))
    assert over_dense({(0, "a"): full, (0, "b"): small}) == [(0, "a")]
    assert cost_of(full, BYTES) == 3 * 8 * 4


def test_the_choice_is_logged(source_of: SourceOf, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="rk_export.methods.sparse_sites"):
        _chosen(source_of("llama"), tmp_path, Budget("keep", 0.5), selector="auction")
    assert "more than dense" in caplog.text
