"""Whole KV groups: the heads that stay compute what they did, the output projection is refitted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rk_export.passes.base import Layer
from rk_export.passes.modules.heads import HeadSlots, PaddedHeads, SlicedHeads
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.pruning import Reduction, block_costs, refit
from rk_export.passes.weights.prune_groups import PruneGroups, group_scores
from rk_export.plan import LayerShape, SitePlan

GROUPS, PER_GROUP, DIM, HIDDEN, TOKENS = 3, 2, 8, 24, 500
HEADS = GROUPS * PER_GROUP


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(bias: bool = True) -> Layer:
    """Return a layer with the projections of grouped attention alone."""
    torch.manual_seed(0)
    module = nn.Module()
    module.q, module.o = nn.Linear(HIDDEN, HEADS * DIM, bias), nn.Linear(HEADS * DIM, HIDDEN, bias)
    module.k, module.v = (nn.Linear(HIDDEN, GROUPS * DIM, bias) for _ in range(2))
    return Layer(1, module.requires_grad_(False), GROUPS)


def sites() -> list[SitePlan]:
    return [
        SitePlan("layers.1.qkv", 1, ("q", "k", "v"), ("q", "k", "v"), "dense", 0, None),
        SitePlan("layers.1.o", 1, ("o",), ("o",), "dense", 0, None),
    ]


def attended() -> Tensor:
    """Return what an output projection may read (tokens, heads * dim), heads correlated."""
    return random(TOKENS, 20) @ random(20, HEADS * DIM, seed=1) + 0.5 * random(TOKENS, HEADS * DIM, seed=2)


def moments(z: Tensor) -> dict[str, Curvature]:
    return {"layers.1.o": Curvature(Inputs(z.T @ z / len(z), tokens=len(z)))}


def prune(layer: Layer, kept: tuple[int, ...], statistics: dict[str, Curvature]) -> dict[str, object]:
    finding = PruneGroups(torch.device("cpu")).rewrite(
        layer, LayerShape(1, kv_groups=kept), sites(), statistics
    )
    return {"error": finding.error, "before": finding.bytes_before, **(finding.details or {})}


@pytest.mark.parametrize("kept", [(0,), (1, 2), (0, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_heads_that_stay_come_first_and_zeros_after_them(kept: tuple[int, ...], bias: bool) -> None:
    layer, dense, x = attention(bias), attention(bias), random(2, 5, HIDDEN)
    prune(layer, kept, {})
    for role, per_group in (("q", PER_GROUP), ("k", 1), ("v", 1)):
        before = dense.linear(role)(x).view(2, 5, GROUPS, per_group * DIM)
        after = layer.module.get_submodule(role)(x).view(2, 5, GROUPS, per_group * DIM)
        torch.testing.assert_close(after[:, :, : len(kept)], before[:, :, list(kept)])
        assert not after[:, :, len(kept) :].any()
        assert layer.linear(role).out_features == len(kept) * per_group * DIM


def test_without_statistics_the_output_projection_loses_columns_only() -> None:
    layer, dense, z = attention(), attention().linear("o"), random(2, 5, HEADS * DIM)
    details = prune(layer, (0, 2), {})
    heads = z.view(2, 5, GROUPS, -1)
    moved = torch.cat([heads[:, :, [0, 2]], random(2, 5, 1, PER_GROUP * DIM)], dim=2)
    silent = heads.clone()
    silent[:, :, 1] = 0
    torch.testing.assert_close(
        layer.module.get_submodule("o")(moved.flatten(2)), dense(silent.flatten(2)), rtol=1e-4, atol=1e-5
    )
    assert details["corrected"] is False
    assert details["before"] == 4 * PER_GROUP * DIM * HIDDEN * 2 + 4 * DIM * HIDDEN * 2


def columns_of(W: Tensor, kept: tuple[int, ...]) -> Tensor:
    return W.view(len(W), GROUPS, -1)[:, list(kept)].flatten(1)


def test_the_correction_is_least_squares() -> None:
    layer, z = attention(False), attended()
    W = layer.linear("o").weight.clone()
    details = prune(layer, (0, 2), moments(z))
    stay = z.view(TOKENS, GROUPS, -1)[:, [0, 2]].flatten(1)
    best = torch.linalg.lstsq(stay.double(), (z @ W.T).double())
    error = float((stay @ layer.linear("o").weight.T - z @ W.T).norm() / (z @ W.T).norm())
    uncorrected = float((stay @ columns_of(W, (0, 2)).T - z @ W.T).norm() / (z @ W.T).norm())
    lowest = float((stay.double() @ best.solution - (z @ W.T).double()).norm() / (z @ W.T).norm())
    assert lowest <= error < 0.9 * uncorrected
    assert details["error"] == pytest.approx(error, rel=1e-3)
    assert details["corrected"] is True


def test_scores_are_the_cost_after_the_correction() -> None:
    layer, z = attention(False), attended()
    W, H = layer.linear("o").weight.double(), (z.T @ z / TOKENS).double()
    torch.testing.assert_close(group_scores(layer, sites(), moments(z)), block_costs(W, H, GROUPS))
    for group in range(GROUPS):
        stay = torch.tensor([i for i in range(HEADS * DIM) if i // (PER_GROUP * DIM) != group])
        inputs = Reduction.of_columns(H, stay)
        error = inputs.error(W, refit(W, W[:, stay], inputs, 1e-12))
        exact = block_costs(W, H, GROUPS, 1e-12)[group]
        assert float(exact) == pytest.approx(error**2 * float(torch.trace(W @ H @ W.T)), rel=1e-4)


def test_scores_without_statistics_are_the_norms_of_the_maps() -> None:
    layer = attention()
    values = layer.linear("v").weight.view(GROUPS, DIM, HIDDEN)
    outputs = layer.linear("o").weight.T.view(HEADS, DIM, HIDDEN)
    expected = [
        sum((outputs[group * PER_GROUP + head].T @ values[group]).square().sum() for head in range(PER_GROUP))
        for group in range(GROUPS)
    ]
    torch.testing.assert_close(group_scores(layer, sites(), {}).float(), torch.stack(expected))


def test_scores_see_a_silent_group() -> None:
    layer = attention()
    layer.linear("o").weight[:, PER_GROUP * DIM : 2 * PER_GROUP * DIM] = 0
    for statistics in ({}, moments(attended())):
        scores = group_scores(layer, sites(), statistics)
        assert scores.argmin() == 1
        assert float(scores[1]) < 1e-9 * float(scores[0])


def test_padding_and_slicing_are_transposes() -> None:
    slots = HeadSlots(heads=2, width=3, all_heads=4, head_dim=5)
    padded = PaddedHeads(nn.Identity(), slots)(random(7, 6))
    assert padded.shape == (7, 20)
    torch.testing.assert_close(SlicedHeads(nn.Identity(), slots)(padded), random(7, 6))
    assert float(padded.square().sum()) == pytest.approx(float(random(7, 6).square().sum()))
