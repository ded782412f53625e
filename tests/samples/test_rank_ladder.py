"""A ladder's truncated model computes what the factor pairs of the same plan compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from made_recipes import made_recipe
from papers.joint_rank.ladder import RankLadder
from transformers import PreTrainedModel

from rk_export.commands.compression_inputs import compression_inputs
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import RankRule
from rk_export.passes.numerics.adaptive_ranks import DENSE
from rk_export.planning.planner import decide_plan
from rk_export.source.stored import StoredModel, open_source

IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("metric", ["none", "self"])
@pytest.mark.parametrize(
    ("groups", "qk"), [(("qk",), "whole"), (("qk",), "per-head"), (("gate", "up"), "whole")]
)
def test_cut_is_what_rewrite_computes(
    llama: Path, groups: tuple[str, ...], qk: Literal["whole", "per-head"], metric: Literal["none", "self"]
) -> None:
    source = open_source(llama)
    options = made_recipe(
        groups=groups,
        qk=qk,
        rank=RankRule("keep", 0.7),
        rank_multiple=1,
        quant=None,
        table=None,
        calibration=CalibrationOptions(metric, tokens=512),
    )
    inputs = compression_inputs(source, options)
    rewritten, model = inputs.rewrite(decide_plan(source, options)).model, source.load()
    expected, dense = logits(rewritten), logits(model)
    ladder = RankLadder.of(
        model, source.architecture, groups, per_head=qk == "per-head", statistics=inputs.statistics
    )
    ranks = ladder.ranks_of_ratio(0.7)
    with ladder.cut(ranks):
        cut = logits(model)
    assert torch.allclose(cut, expected, atol=2e-4 * float(expected.abs().max()))
    assert not torch.allclose(cut, dense, atol=1e-2 * float(expected.abs().max()))
    assert torch.equal(logits(model), dense)
    assert 0.6 < ladder.kept(ranks) <= 0.7


@pytest.fixture
def source(source_of: Callable[..., StoredModel]) -> StoredModel:
    return source_of("llama")


@torch.no_grad()
def test_full_rank_and_dense_change_nothing(source: StoredModel) -> None:
    model = source.load()
    ladder = RankLadder.of(model, source.architecture, ("gate_up",))
    assert [pair.target for pair in ladder.pairs] == ["layers.0.gate_up", "layers.1.gate_up"]
    full = ladder.ranks_of_share(1.0)
    assert full == [64, 64]
    assert ladder.kept(full) > 1 == ladder.kept([DENSE, DENSE])
    assert ladder.relative_error(full) < 1e-6
    assert ladder.relative_error([DENSE, DENSE]) == 0
    lost = sum(float(pair.factors.singular_values[10:].square().sum()) for pair in ladder.pairs)
    total = sum(float(pair.factors.singular_values.square().sum()) for pair in ladder.pairs)
    assert ladder.weighted_error([10, DENSE]) < ladder.weighted_error([10, 10])
    assert ladder.weighted_error([10, 10]) == pytest.approx((lost / total) ** 0.5)
    assert ladder.relative_error([10, 10]) == pytest.approx((lost / total) ** 0.5, rel=1e-4)


@torch.no_grad()
def test_weights_come_back_after_an_error(source: StoredModel) -> None:
    model = source.load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ladder = RankLadder.of(model, source.architecture, ("qk",), per_head=True)
    name = "model.layers.0.self_attn.k_proj.weight"

    def fail_inside() -> None:
        with ladder.cut([1] * len(ladder.pairs)):
            assert not torch.equal(model.state_dict()[name], before[name])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
