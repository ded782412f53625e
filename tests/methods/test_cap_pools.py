"""Candidate pools of a model: what they add up to, their prices, the cache, and what is refused before work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rk_export.errors import InputError
from rk_export.methods.cap import pools as cap_pools
from rk_export.methods.cap.pools import Pool, by_place, flat_prices, make_pools, pool_of, selected
from rk_export.methods.sparse_sites import BYTES, PARAMETERS, linear_shapes
from rk_export.passes.numerics.rpca import rpca
from rk_export.source.stored import StoredModel

SourceOf = Callable[..., StoredModel]
CPU = torch.device("cpu")


def _pool() -> Pool:
    W = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    split = rpca(W, 15)
    return pool_of(W, split.low, split.exact_sparse(W))


def test_all_candidates_give_the_matrices(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    pools = make_pools(source, 10, CPU, tmp_path)
    shapes = linear_shapes(source)
    assert list(pools) == list(shapes)
    layers = source.load().get_submodule(source.architecture.layers)
    for (layer, path), pool in pools.items():
        W = layers.get_submodule(f"{layer}.{path}").weight
        assert pool.parts.shape == shapes[layer, path]
        assert 0 < pool.parts.rank < min(W.shape)
        assert 0 < pool.parts.entries < W.numel()
        error = float(torch.linalg.vector_norm(W - pool.parts.dense()) / torch.linalg.vector_norm(W))
        assert error == pytest.approx(pool.residual, rel=1e-2, abs=1e-6)
        assert error < 0.02


def test_energies_and_prices_of_every_candidate() -> None:
    pool = _pool()
    parts, rank = pool.parts, pool.parts.rank
    energies = pool.energies()
    assert len(energies) == len(pool) == rank + parts.entries
    for index in range(rank):
        product = parts.up[:, index, None] * parts.down[None, index]
        assert float(energies[index]) == pytest.approx(float(product.square().sum()), rel=1e-5)
    torch.testing.assert_close(energies[rank:], parts.values.square())
    assert pool.prices(PARAMETERS).tolist() == [20.0] * rank + [1.0] * parts.entries
    assert pool.prices(BYTES).tolist() == [80.0] * rank + [3.0] * parts.entries
    assert bool((pool.sigma.diff() <= 0).all())


def test_entries_never_cost_more_than_full_columns() -> None:
    assert PARAMETERS.total((4, 5), 2, 7) == 2 * 9 + 7
    assert BYTES.total((4, 5), 2, 7) == 4 * 2 * 9 + 3 * 7
    assert BYTES.total((4, 5), 0, 20) == 2 * 20


def test_both_factors_of_a_direction_carry_the_root_of_its_singular_value() -> None:
    parts = _pool().parts
    torch.testing.assert_close(
        torch.linalg.vector_norm(parts.up, dim=0), torch.linalg.vector_norm(parts.down, dim=1)
    )
    gram = parts.up.T @ parts.up
    assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 1e-5 * float(gram.max())


def test_a_mask_selects_directions_and_entries() -> None:
    pools = {(0, "a"): _pool(), (1, "b"): _pool()}
    prices = flat_prices(pools, PARAMETERS)
    mask = torch.rand(len(prices), generator=torch.Generator().manual_seed(1)) < 0.5
    chosen = selected(pools, mask)
    assert sum(parts.parameters for parts in chosen.values()) == int(prices[mask].sum())
    here = by_place(pools, mask)[1, "b"]
    pool, parts = pools[1, "b"], chosen[1, "b"]
    torch.testing.assert_close(parts.up, pool.parts.up[:, here[: pool.parts.rank]])
    torch.testing.assert_close(parts.values, pool.parts.values[here[pool.parts.rank :]])
    assert selected(pools, torch.ones_like(mask))[0, "a"].entries == pool.parts.entries


def test_a_zero_matrix_has_no_candidate() -> None:
    zeros = torch.zeros(6, 4)
    pool = pool_of(zeros, zeros, zeros)
    assert len(pool) == 0
    assert not pool.parts.dense().any()


def test_pools_are_read_from_disk(
    source_of: SourceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("llama")
    first = make_pools(source, 5, CPU, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(cap_pools, "rpca", _never)
        again = make_pools(source, 5, CPU, tmp_path)
        with pytest.raises(RuntimeError, match="work"):
            make_pools(source, 6, CPU, tmp_path)
    for place, pool in first.items():
        assert torch.equal(pool.parts.dense(), again[place].parts.dense())
        assert pool.residual == again[place].residual
    other = source_of("llama", rms_norm_eps=1e-3, hidden_size=32)
    assert make_pools(other, 5, CPU, tmp_path)[0, "self_attn.q_proj"].parts.shape == (32, 32)


@pytest.mark.parametrize(("family", "reason"), [("mixtral", "experts"), ("bert", "encoder")])
def test_what_the_method_does_not_cover_is_refused_before_work(
    source_of: SourceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, reason: str
) -> None:
    monkeypatch.setattr(cap_pools, "rpca", _never)
    with pytest.raises(InputError, match=reason):
        make_pools(source_of(family), 5, CPU, tmp_path)


def _never(*args: object, **options: object) -> None:
    raise RuntimeError("work was done")
