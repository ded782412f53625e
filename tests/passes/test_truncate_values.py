"""Narrower value heads: exact where nothing is lost, the best of their rank, and exact in the values' bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rk_export.passes.base import Layer
from rk_export.passes.modules.heads import PaddedHeads, SlicedHeads
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.value_heads import narrow_values, value_moments
from rk_export.passes.weights.prune_groups import PruneGroups
from rk_export.passes.weights.truncate_values import TruncateValues
from rk_export.plan import LayerShape, SitePlan

GROUPS, PER_GROUP, DIM, HIDDEN, TOKENS = 2, 3, 8, 20, 300
HEADS = GROUPS * PER_GROUP
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(*, v_bias: bool = False, o_bias: bool = False, value_rank: int = DIM) -> Layer:
    """Return a layer with the projections of grouped attention, the values of each group of a rank."""
    torch.manual_seed(0)
    module = nn.Module()
    module.q, module.o = nn.Linear(HIDDEN, HEADS * DIM), nn.Linear(HEADS * DIM, HIDDEN, o_bias)
    module.k, module.v = nn.Linear(HIDDEN, GROUPS * DIM), nn.Linear(HIDDEN, GROUPS * DIM, v_bias)
    module.requires_grad_(False)
    values = [random(DIM, value_rank, seed=g) @ random(value_rank, HIDDEN, seed=9 + g) for g in range(GROUPS)]
    module.v.weight.copy_(torch.cat(values) / value_rank**0.5)
    return Layer(1, module, GROUPS)


def sites() -> list[SitePlan]:
    return [
        SitePlan("layers.1.qk", 1, ("q", "k"), ("q", "k"), "dense", 0, None),
        *(SitePlan(f"layers.1.{role}", 1, (role,), (role,), "dense", 0, None) for role in ("v", "o")),
    ]


def attend(layer: Layer, x: Tensor, kept: tuple[int, ...] = tuple(range(GROUPS))) -> tuple[Tensor, Tensor]:
    """Return what o reads and what it gives, for x (sequences, length, hidden): attention fixed by a seed.

    Groups that were pruned stand behind those that are `kept`, so each keeps its own attention.
    """
    order = [*kept, *(group for group in range(GROUPS) if group not in kept)]
    weights = torch.softmax(2 * random(len(x), HEADS, x.shape[1], x.shape[1], seed=5), -1)
    weights = weights.view(len(x), GROUPS, PER_GROUP, *weights.shape[2:])[:, order]
    values = layer.module.get_submodule("v")(x).view(*x.shape[:2], GROUPS, DIM)
    read = torch.einsum("bghts,bsgd->btghd", weights, values).flatten(2)
    return read, layer.module.get_submodule("o")(read)


def inputs() -> Tensor:
    """Return x (sequences, length, hidden) with a mean and unequal directions."""
    return random(TOKENS // 10, 10, HIDDEN, seed=3) * torch.linspace(0.2, 2, HIDDEN) + 0.5


def statistics_of(layer: Layer, *, attended: bool = True) -> dict[str, Curvature]:
    x = inputs()
    flat, read = x.flatten(0, 1), attend(layer, x)[0].flatten(0, 1)
    taken = {"v": flat, "o": read} if attended else {"v": flat}
    return {
        f"layers.1.{role}": Curvature(Inputs(z.T @ z / len(z), tokens=len(z))) for role, z in taken.items()
    }


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


METRICS = ["attention output", "input", "weights"]


def statistics_by(metric: str, layer: Layer) -> dict[str, Curvature]:
    return {} if metric == "weights" else statistics_of(layer, attended=metric == "attention output")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("v_bias", [True, False])
@pytest.mark.parametrize("o_bias", [True, False])
def test_values_of_low_rank_lose_nothing(metric: str, v_bias: bool, o_bias: bool, device: str) -> None:
    """The bias of the values lies outside their rank: it stays all the same."""
    layer = attention(v_bias=v_bias, o_bias=o_bias, value_rank=5)
    expected, statistics = attend(layer, inputs())[1], statistics_by(metric, layer)
    finding = TruncateValues(torch.device(device)).rewrite(
        layer, LayerShape(1, value_dim=5), sites(), statistics
    )
    assert relative(attend(layer, inputs())[1], expected) < 1e-4
    assert finding.error == pytest.approx(0, abs=1e-3)
    assert (layer.linear("o").bias is not None) is (v_bias or o_bias)
    assert finding.target == "layers.1.value_dim"
    used = "input" if v_bias and metric == "attention output" else metric
    assert finding.details == {"pass": "value_dim", "kept": 5, "of": DIM, "weighed_by": used}
    assert (finding.bytes_before, finding.bytes_after) == (4 * 3 * HIDDEN * (GROUPS + HEADS), 0)


def test_the_modules_have_the_shapes_of_narrow_heads() -> None:
    layer = attention(v_bias=True)
    TruncateValues(CPU).rewrite(layer, LayerShape(1, value_dim=3), sites(), {})
    v, o = (layer.module.get_submodule(role) for role in "vo")
    assert isinstance(v, PaddedHeads)
    assert isinstance(o, SlicedHeads)
    assert (layer.linear("v").weight.shape, layer.linear("o").weight.shape) == (
        (GROUPS * 3, HIDDEN),
        (HIDDEN, HEADS * 3),
    )
    assert isinstance(layer.module.q, nn.Linear)
    assert not v(inputs()).view(-1, GROUPS, DIM)[..., 3:].any()


def test_the_finding_has_the_measured_error() -> None:
    layer = attention()
    statistics, expected = statistics_of(layer), attend(layer, inputs())[1]
    finding = TruncateValues(CPU).rewrite(layer, LayerShape(1, value_dim=5), sites(), statistics)
    assert finding.error == pytest.approx(relative(attend(layer, inputs())[1], expected), rel=1e-3)


def test_more_statistics_lose_less() -> None:
    errors = []
    for metric in METRICS:
        layer = attention()
        statistics, expected = statistics_by(metric, layer), attend(layer, inputs())[1]
        TruncateValues(CPU).rewrite(layer, LayerShape(1, value_dim=4), sites(), statistics)
        errors.append(relative(attend(layer, inputs())[1], expected))
    assert errors[0] < errors[1] < errors[2]


def test_a_single_group_and_white_inputs_give_the_truncated_svd() -> None:
    """One head, identity moments: the product W_O W_V is cut at its leading singular values."""
    W_O, W_V = random(HIDDEN, DIM).double(), random(DIM, HIDDEN, seed=1).double()
    H = value_moments(W_V, torch.eye(HIDDEN), 1, 1)
    narrow = narrow_values(W_O, H, 1, DIM, 3)
    U, S, V = torch.linalg.svd(W_O @ W_V, full_matrices=False)
    expected = (U[:, :3] * S[:3]) @ V[:3]
    torch.testing.assert_close(narrow.output @ narrow.narrowed(W_V), expected, rtol=1e-4, atol=1e-6)
    assert narrow.error == pytest.approx(float((S[3:].square().sum() / S.square().sum()).sqrt()), rel=1e-4)


def test_the_basis_is_better_than_others_of_its_rank() -> None:
    """Random bases and the leading directions of the values alone, each with outputs fitted to it."""
    layer = attention()
    x = inputs()
    read, expected = (z.flatten(0, 1).double() for z in attend(layer, x))
    H = read.T @ read / len(read)
    narrow = narrow_values(layer.linear("o").weight.double(), H, GROUPS, DIM, 4)

    def best(down: Tensor) -> float:
        z = torch.einsum("grd,tghd->tghr", down, read.view(-1, GROUPS, PER_GROUP, DIM)).flatten(1)
        return relative(z @ torch.linalg.lstsq(z, expected).solution, expected)

    own = best(narrow.down)
    assert own <= narrow.error <= 1.1 * own
    by_size = torch.stack(
        [
            torch.linalg.svd(W, full_matrices=False).U[:, :4].T
            for W in layer.linear("v").weight.double().view(GROUPS, DIM, -1)
        ]
    )
    assert own < best(by_size)
    assert all(own < best(random(GROUPS, 4, DIM, seed=seed).double()) for seed in range(5))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("v_bias", [True, False])
def test_after_groups_went(metric: str, v_bias: bool) -> None:
    """The statistics are those of all heads; the group that is left has values of rank 4."""
    layer = attention(v_bias=v_bias, value_rank=4)
    statistics, shape = statistics_by(metric, layer), LayerShape(1, value_dim=4, kv_groups=(1,))
    PruneGroups(CPU).rewrite(layer, shape, sites(), statistics)
    expected = attend(layer, inputs(), (1,))[1]
    TruncateValues(CPU).rewrite(layer, shape, sites(), statistics)
    assert relative(attend(layer, inputs(), (1,))[1], expected) < 1e-4
    assert layer.linear("o").in_features == PER_GROUP * 4
