"""Mixtures as the hub stores them, and as transformers holds them: both spellings give the same model, streamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from rk_export.source.stored import open_source

_EACH = ("mlp.experts.0.gate_proj.weight", "mlp.experts.1.down_proj.weight", "mlp.gate.weight")
_WN = ("block_sparse_moe.experts.0.w1.weight", "block_sparse_moe.experts.1.w2.weight")
_GRANITE = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.router.layer.weight")
# Names that a checkpoint on the hub has in its last layer.
STORED = {
    "mixtral": (*_WN, "block_sparse_moe.gate.weight"),
    "qwen3_moe": _EACH,
    "qwen2_moe": (*_EACH, "mlp.shared_expert.up_proj.weight", "mlp.shared_expert_gate.weight"),
    "olmoe": _EACH,
    "granitemoe": _GRANITE,
    "granitemoeshared": (*_GRANITE, "shared_mlp.input_linear.weight"),
    "phimoe": (*_WN, "block_sparse_moe.gate.weight"),
    "ernie4_5_moe": (*_EACH, "mlp.moe_statics.e_score_correction_bias", "mlp.shared_experts.up_proj.bias"),
}
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.mark.parametrize("family", STORED)
def test_both_spellings_give_the_same_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    last = f"model.layers.{model.config.num_hidden_layers - 1}"
    assert {f"{last}.{name}" for name in STORED[family]} <= load_file(path).keys()
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(open_source(tmp_path).load()(IDS).logits, expected, rtol=0, atol=2e-5)
        own = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(own, path, {"format": "pt"})
        torch.testing.assert_close(open_source(tmp_path).load()(IDS).logits, expected, rtol=0, atol=2e-5)
