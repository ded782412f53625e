"""The policy gradient: its step, what is put into the model, the start, the search and its resumption."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.methods.cap import policy as cap_policy
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.cap.policy import first_probabilities, learn, reinforce, set_weight
from rk_export.methods.cap.pools import Pool, Pools, by_place, flat_prices, make_pools
from rk_export.methods.cap.scores import all_scores, energy_score
from rk_export.methods.sparse_sites import PARAMETERS, linear_shapes
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.source.stored import StoredModel

SourceOf = Callable[..., StoredModel]
CPU = torch.device("cpu")
Q = (0, "self_attn.q_proj")


@pytest.fixture
def source(source_of: SourceOf) -> StoredModel:
    return source_of("llama")


@pytest.fixture
def pools(source: StoredModel, tmp_path: Path) -> Pools:
    return make_pools(source, 5, CPU, tmp_path)


def _tokens(source: StoredModel, sequences: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, source.config.vocab_size, (sequences, 16), generator=generator)


def _budget(source: StoredModel, keep: float) -> float:
    return keep * sum(rows * columns for rows, columns in linear_shapes(source).values())


def _first(pools: Pools, budget: float) -> Tensor:
    return first_probabilities(pools, all_scores(energy_score(PARAMETERS), pools), PARAMETERS, budget)


def test_a_step_follows_the_formula() -> None:
    s, mask = torch.tensor([0.2, 0.2, 0.9, 1.0]), torch.tensor([True, False, True, True])
    expected = s - 0.3 * (mask.float() - s) / (s * (1 - s) + cap_policy.EPSILON)
    reinforce(s, mask, 0.3)
    torch.testing.assert_close(s, expected)


def test_the_expected_step_is_the_gradient_of_the_expected_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cap_policy, "EPSILON", 0.0)
    s = torch.tensor([0.3, 0.6, 0.8], dtype=torch.float64, requires_grad=True)

    def loss(mask: Tensor) -> float:
        return float(mask[0] * 2 - mask[1] * mask[2] + 0.5 * mask[2])

    masks = [torch.tensor(bits) for bits in itertools.product([False, True], repeat=3)]
    chances = [torch.where(mask, s, 1 - s).prod() for mask in masks]
    torch.stack(
        [chance * loss(mask.double()) for mask, chance in zip(masks, chances, strict=True)]
    ).sum().backward()  # type: ignore[no-untyped-call]
    steps = torch.zeros(3, dtype=torch.float64)
    for mask, chance in zip(masks, chances, strict=True):
        moved = s.detach().clone()
        reinforce(moved, mask, loss(mask.double()))
        steps += chance.detach() * (s.detach() - moved)
    assert s.grad is not None
    torch.testing.assert_close(steps, s.grad)


def test_masks_are_put_into_the_model(pools: Pools) -> None:
    pool = pools[Q]
    mask = torch.rand(len(pool), generator=torch.Generator().manual_seed(3)) < 0.4
    linear = nn.Linear(pool.parts.shape[1], pool.parts.shape[0], bias=False).requires_grad_(False)
    set_weight(linear, pool, mask)
    torch.testing.assert_close(linear.weight, pool.selected(mask).dense())
    set_weight(linear, pool, torch.zeros_like(mask))
    assert not linear.weight.any()


def test_the_start_costs_the_budget_and_prefers_energy(source: StoredModel, pools: Pools) -> None:
    budget, prices = _budget(source, 0.5), flat_prices(pools, PARAMETERS)
    s = _first(pools, budget)
    assert float(prices.double() @ s.double()) == pytest.approx(budget, rel=1e-3)
    parts = pools[Q].parts
    of_entries = by_place(pools, s)[Q][parts.rank :]
    assert bool((of_entries[parts.values.abs().argsort()].diff() >= 0).all())


def test_probabilities_of_what_raises_the_loss_fall(
    source: StoredModel, pools: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept_of_q(
        model: PreTrainedModel, layers: nn.Module, fill: Callable[[int], None], batches: Sequence[Tensor]
    ) -> list[float]:
        fill(0)
        return [float((layers.get_submodule("0." + Q[1]).weight != 0).float().sum())] * len(batches)

    # A few entries of every matrix and no direction: the loss counts the entries of one matrix.
    monkeypatch.setattr(cap_policy, "next_token_losses", kept_of_q)
    few = {place: Pool(_first_entries(pool.parts, 40)) for place, pool in pools.items()}
    budget = 0.5 * float(flat_prices(few, PARAMETERS).sum())
    options = CapOptions(keep=0.5, steps=100, learning_rate=0.01, batch_tokens=32)
    learned = learn(
        source,
        few,
        _first(few, budget),
        budget,
        PARAMETERS,
        options,
        tokens=_tokens(source),
        device=CPU,
        cache_dir=tmp_path,
    )
    before = by_place(few, _first(few, budget))
    after = by_place(few, learned.probabilities)
    changes = {place: float((after[place] - before[place]).mean()) for place in few}
    assert changes[Q] < -0.1
    assert changes[Q] < 2 * min(change for place, change in changes.items() if place != Q)


def _first_entries(parts: Parts, count: int) -> Parts:
    return Parts(parts.up[:, :0], parts.down[:0], parts.indices[:count], parts.values[:count])


def test_the_search_stays_in_the_budget_and_is_deterministic(
    source: StoredModel, pools: Pools, tmp_path: Path
) -> None:
    budget, prices = _budget(source, 0.5), flat_prices(pools, PARAMETERS)
    options = CapOptions(keep=0.5, steps=4, batch_tokens=32)
    runs = [
        learn(
            source,
            pools,
            _first(pools, budget),
            budget,
            PARAMETERS,
            options,
            tokens=_tokens(source),
            device=CPU,
            cache_dir=tmp_path / str(i),
        )
        for i in range(2)
    ]
    s = runs[0].probabilities
    assert torch.equal(s, runs[1].probabilities)
    assert runs[0].losses == runs[1].losses
    assert len(set(runs[0].losses)) == 4
    assert float(s.min()) >= 0
    assert float(s.max()) <= 1
    assert float(prices.double() @ s.double()) <= budget * (1 + 1e-6)


def test_an_interrupted_search_goes_on_where_it_stopped(
    source: StoredModel, pools: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, budget = CapOptions(keep=0.5, steps=5, batch_tokens=32, seed=7), _budget(source, 0.5)
    monkeypatch.setattr(cap_policy, "KEEP_EVERY", 2)

    def search(folder: str) -> cap_policy.Learned:
        return learn(
            source,
            pools,
            _first(pools, budget),
            budget,
            PARAMETERS,
            options,
            tokens=_tokens(source),
            device=CPU,
            cache_dir=tmp_path / folder,
        )

    whole = search("whole")
    calls, real = itertools.count(), cap_policy.next_token_losses

    def breaks_down(*arguments: Any) -> list[float]:
        if next(calls) == 1 + 3:  # the start's batches, three steps, then
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(cap_policy, "next_token_losses", breaks_down)
        with pytest.raises(KeyboardInterrupt):
            search("broken")
    resumed = search("broken")
    assert torch.equal(resumed.probabilities, whole.probabilities)
    assert resumed.losses == whole.losses
    monkeypatch.setattr(cap_policy, "next_token_losses", None)  # what is finished runs nothing
    assert search("broken").losses == whole.losses
