"""Where float32 alone moves the logits of a model far, exact computations of it pass; faults are found elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from rk_export import Recipe, compress
from rk_export.options.calibration import UNWEIGHED
from rk_export.options.prepare import Prepare
from rk_export.options.run import Run
from rk_export.parity.comparison import FLOAT_BOUND
from rk_export.parity.float_steps import shaking_outputs
from rk_export.report.records import ParityTier

LARGE_GAIN = 100.0  # in a norm before the attention, whose softmax then saturates


def in_floats(model: Path, bundle: Path, prepare: tuple[str, ...] = ()) -> dict[str, ParityTier]:
    options = Recipe((Prepare(prepare),), UNWEIGHED)
    return {tier.tier: tier for tier in compress(model, bundle, options, run=Run(threads=1)).parity}


@pytest.mark.whole
def test_exact_reparameterizations_of_a_saturated_attention_pass(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    model = tiny_model("llama", vocab_size=320)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = LARGE_GAIN
        model.model.layers[0].post_attention_layernorm.weight[3] = LARGE_GAIN
    model.save_pretrained(tmp_path / "model")
    tiers = in_floats(tmp_path / "model", tmp_path / "out", ("fold", "rotate"))
    bound = tiers["p"].bound
    assert bound is not None
    assert bound > FLOAT_BOUND["fp32"], "the scores inside a layer round too, not its output alone"
    assert all(tier.passed is not False for tier in tiers.values())


@pytest.mark.whole
def test_a_cache_that_rounds_more_than_prefill_does_passes(tmp_path: Path) -> None:
    """The bound follows the largest error of the tiers that it is for: here only that of tier e is a large one."""
    model = tiny_model("gemma3", vocab_size=320)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] = LARGE_GAIN
            layer.post_feedforward_layernorm.weight[3] = 3 * LARGE_GAIN
    model.save_pretrained(tmp_path / "model")
    tiers = in_floats(tmp_path / "model", tmp_path / "out")
    assert {tiers[name].bound for name in "cef"} == {tiers["c"].bound}
    assert all(tiers[name].passed for name in "0cefg"), "two ways to run PyTorch differ as much"


def test_modules_without_children_are_shaken_by_a_float32_step() -> None:
    model = tiny_model("llama")
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        exact = model.model(tokens).last_hidden_state
        with shaking_outputs(model, torch.Generator().manual_seed(0)):
            moved = model.model(tokens).last_hidden_state
        again = model.model(tokens).last_hidden_state
    difference = float((moved - exact).abs().max() / exact.abs().max())
    assert 1e-8 < difference < FLOAT_BOUND["fp32"]
    assert torch.equal(exact, again), "nothing stays behind"
