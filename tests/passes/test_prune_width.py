"""FFN width: which neurons stay, what the correction makes up for, against least squares in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from rk_export.passes.base import Layer
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.pruning import Reduction, eliminate_columns, largest, neuron_norms, refit
from rk_export.passes.weights.prune_width import PruneWidth
from rk_export.plan import LayerShape, SitePlan
from rk_export.report.records import Outcome

HIDDEN, WIDTH, TOKENS = 12, 20, 400


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(columns: int = WIDTH) -> Tensor:
    """Return inputs (tokens, columns) of few directions and some noise, of very different sizes."""
    inputs = random(TOKENS, 6) @ random(6, columns, seed=1) + 0.3 * random(TOKENS, columns, seed=2)
    return inputs * torch.linspace(0.1, 2, columns)


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def fitted(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Return the least-squares matrix from x to y (tokens first), and its relative error."""
    W = torch.linalg.lstsq(x, y).solution.T
    return W, float((x @ W.T - y).norm() / y.norm())


def test_the_refit_is_least_squares_and_its_error_the_measured_one() -> None:
    x, W, kept = correlated(), random(5, WIDTH, seed=3), torch.arange(0, WIDTH, 2)
    inputs = Reduction.of_columns(moment(x), kept)
    expected, error = fitted(x[:, kept], x @ W.T)
    actual = refit(W, W[:, kept], inputs, damping=1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert inputs.error(W, actual) == pytest.approx(error, rel=1e-5)
    plain = float((x[:, kept] @ W[:, kept].T - x @ W.T).norm() / (x @ W.T).norm())
    assert inputs.error(W, W[:, kept]) == pytest.approx(plain, rel=1e-5)
    assert error < 0.8 * plain


def test_damping_pulls_to_the_columns_as_they_were() -> None:
    x, W, kept = correlated(), random(5, WIDTH, seed=3), torch.arange(0, WIDTH, 2)
    inputs = Reduction.of_columns(moment(x), kept)
    moved = [float((refit(W, W[:, kept], inputs, d) - W[:, kept]).norm()) for d in (1e-3, 1.0, 1e9)]
    assert moved[0] > moved[1] > 1e4 * moved[2]


def test_a_map_reduces_like_its_product() -> None:
    x, L = correlated(), random(7, WIDTH, seed=5)
    inputs, z = Reduction.of_map(moment(x), L), x @ L.T
    torch.testing.assert_close(inputs.reduced, moment(z))
    torch.testing.assert_close(inputs.cross, x.T @ z / TOKENS)


def test_one_column_goes_as_exhaustive_search_says() -> None:
    x, W = correlated(8), random(5, 8, seed=3)
    kept = eliminate_columns(W, moment(x), 7, damping=1e-12)
    errors = {left: fitted(x[:, list(left)], x @ W.T)[1] for left in itertools.combinations(range(8), 7)}
    assert tuple(kept.tolist()) == min(errors, key=lambda left: errors[left])


@pytest.mark.parametrize("count", [1, 4, 10, 19])
def test_elimination_beats_the_largest_columns(count: int) -> None:
    x, W = correlated(), random(5, WIDTH, seed=3)
    H = moment(x)
    kept = eliminate_columns(W, H, count, damping=1e-12)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == count
    by_size = largest(H.diagonal() * W.square().sum(0), count)
    assert fitted(x[:, kept], x @ W.T)[1] <= fitted(x[:, by_size], x @ W.T)[1] + 1e-9


def test_columns_that_others_replace_go_first() -> None:
    x = random(TOKENS, 10)
    x[:, 7] = 3 * x[:, 1] - x[:, 4]
    W = random(5, 10, seed=3)
    W[:, 2] = 0
    kept = eliminate_columns(W, moment(x), 8, damping=1e-9)
    assert 2 not in kept
    assert len({1, 4, 7} - set(kept.tolist())) == 1
    assert fitted(x[:, kept], x @ W.T)[1] < 1e-10


@pytest.mark.parametrize("count", [0, 11])
def test_a_count_that_no_matrix_has_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="columns of 10"):
        eliminate_columns(random(5, 10), moment(random(TOKENS, 10)), count)


def test_norms_multiply() -> None:
    down, gate, up = random(4, 6), random(6, 3, seed=1), random(6, 3, seed=2)
    scores = neuron_norms([gate, up], down)
    expected = [down[:, i].norm() * gate[i].norm() * up[i].norm() for i in range(6)]
    torch.testing.assert_close(scores, torch.stack(expected))
    assert largest(scores, 2).tolist() == sorted(scores.argsort()[-2:].tolist())


def mlp(gated: bool, bias: bool) -> Layer:
    """Return a layer with an MLP alone."""
    torch.manual_seed(0)
    module = nn.Module()
    for name in ("gate", "up") if gated else ("up",):
        module.add_module(name, nn.Linear(HIDDEN, WIDTH, bias))
    module.down = nn.Linear(WIDTH, HIDDEN, bias)
    return Layer(3, module.requires_grad_(False), kv_groups=1)


def neurons(layer: Layer, x: Tensor) -> Tensor:
    up = layer.linear("up")(x)
    if not hasattr(layer.module, "gate"):
        return torch.relu(up)
    return nn.functional.silu(layer.linear("gate")(x)) * up


def sites_of(layer: Layer) -> list[SitePlan]:
    readers = tuple(name for name in ("gate", "up") if hasattr(layer.module, name))
    return [
        SitePlan("layers.3.readers", 3, readers, readers, "dense", 0, None),
        SitePlan("layers.3.down", 3, ("down",), ("down",), "dense", 0, None),
    ]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pruned_mlp_computes_the_best_of_its_neurons(gated: bool, bias: bool, device: str) -> None:
    layer, x = mlp(gated, bias), random(TOKENS, HIDDEN).float()
    hidden = neurons(layer, x)
    dense = layer.linear("down")
    expected = dense(hidden)
    statistics = {"layers.3.down": Curvature(Inputs(moment(hidden), tokens=TOKENS))}
    finding = PruneWidth(torch.device(device)).rewrite(
        layer, LayerShape(3, ffn_width=14), sites_of(layer), statistics
    )
    kept = [
        i for i in range(WIDTH) if any(torch.equal(up, dense_up(gated, bias)[i]) for up in up_rows(layer))
    ]
    assert len(kept) == 14
    actual = layer.linear("down")(neurons(layer, x))
    offset = 0 if dense.bias is None else dense.bias
    best = fitted(hidden[:, kept].double(), (expected - offset).double())[1]
    error = float((actual - expected).norm() / (expected - offset).norm())
    uncorrected = hidden[:, kept] @ dense.weight[:, kept].T + offset - expected
    assert best <= error < float(uncorrected.norm() / (expected - offset).norm())
    assert finding.error == pytest.approx(error, rel=1e-3)
    assert finding.target == "layers.3.ffn_width"
    assert finding.outcome is Outcome.APPLIED
    assert (finding.bytes_before, finding.bytes_after) == (6 * HIDDEN * (3 if gated else 2) * 4, 0)
    assert finding.details == {"pass": "ffn_width", "kept": 14, "of": WIDTH, "corrected": True}


def dense_up(gated: bool, bias: bool) -> Tensor:
    return mlp(gated, bias).linear("up").weight


def up_rows(layer: Layer) -> Tensor:
    return layer.linear("up").weight


def test_without_statistics_nothing_is_corrected_and_the_finding_says_so() -> None:
    layer, dense = mlp(True, False), mlp(True, False)
    finding = PruneWidth(torch.device("cpu")).rewrite(layer, LayerShape(3, ffn_width=14), sites_of(layer), {})
    weights = [dense.linear(role).weight for role in ("gate", "up", "down")]
    kept = largest(neuron_norms(weights[:2], weights[2]), 14)
    assert torch.equal(layer.linear("down").weight, weights[2][:, kept])
    assert torch.equal(layer.linear("gate").weight, weights[0][kept])
    assert finding.details is not None
    assert finding.details["corrected"] is False
    lost = weights[2].square().sum() - weights[2][:, kept].square().sum()
    assert finding.error == pytest.approx(float((lost / weights[2].square().sum()).sqrt()), rel=1e-5)
