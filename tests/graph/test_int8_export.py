"""Int8 matrices with int8 inputs in the exported graph: what ONNX Runtime computes, from which nodes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from compressed import OnnxModel, SourceOf, compress, floats, level_0, logits, tokens
from conftest import tiny_options

from rk_export import compress as compress_model
from rk_export import make_plan, verify
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.options.run import Run
from rk_export.passes.modules.quantized import float_inputs
from rk_export.rewrite.apply import rewrite
from rk_export.rewrite.checkpoint import load_pretrained, save_pretrained

pytestmark = pytest.mark.whole

RANK_8 = RankRule("rank", 8)
FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "qwen3", "mixtral", "bert")
# Two exact computations of a rounded input may round it differently. Measured over these models: up to 0.11 of
# what the rounding costs (gpt2), 1e-5 of it elsewhere.
FLIPS = 0.25


def options(form: str) -> Any:
    forms: dict[str, dict[str, Any]] = {
        "dense": {},
        "joint": {"groups": ("qk",), "rank": RANK_8},
        "all three": {"groups": ("qkv",), "rank": RANK_8},
        "per-head": {"groups": ("qk",), "rank": RANK_8, "qk": "per-head"},
    }
    return floats(**{"quant": W8A8, **forms[form]})


@pytest.mark.parametrize(
    ("form", "family"),
    [
        (form, family)
        for form in ("dense", "joint", "per-head", "all three")
        for family in FAMILIES
        if (form, family) != ("all three", "bert")  # its v is of another group
    ],
)
def test_onnx_computes_what_pytorch_computes(
    source_of: SourceOf, tmp_path: Path, family: str, form: str
) -> None:
    source = source_of(family)
    rewritten = compress(source, options(form))
    model, ids = OnnxModel(rewritten, tmp_path), tokens(source)
    assert all(fusion.found == fusion.planned for fusion in model.fusions)
    rounded = logits(rewritten.model, ids)
    with float_inputs(rewritten.model):
        exact = logits(rewritten.model, ids)
    cost = float((rounded - exact).abs().max())
    assert cost > 0
    assert float((model.run(ids)[0] - rounded).abs().max()) < FLIPS * cost
    assert float((level_0(model, ids) - exact).abs().max() / exact.abs().max()) < 1e-5


def test_a_shared_input_is_quantized_once_and_products_are_of_the_fast_kind(
    source_of: SourceOf, tmp_path: Path
) -> None:
    rewritten = compress(source_of("qwen2"), options("dense"))
    graph = OnnxModel(rewritten, tmp_path).graph.graph
    counts = Counter(node.op_type for node in graph)
    layers = 2
    inputs = products = 0
    for node in graph:
        if node.op_type == "QuantizeLinear":
            assert node.inputs[2] is not None
            inputs += node.inputs[2].dtype == ir.DataType.UINT8
        elif node.op_type == "MatMulIntegerToFloat":
            assert node.inputs[1] is not None
            products += node.inputs[1].dtype == ir.DataType.INT8
    assert inputs == counts["QuantizeLinear"] == 4 * layers  # attention, o, mlp, down
    assert products == counts["MatMulIntegerToFloat"] == 5 * layers  # q, k and v are one
    assert counts["DynamicQuantizeMatMul"] == counts["Split"] == 0


def test_attention_takes_the_three_up_projections_of_one_pair_as_one(
    source_of: SourceOf, tmp_path: Path
) -> None:
    source = source_of("qwen2")
    model = OnnxModel(compress(source, options("all three")), tmp_path)
    for pattern in ("packed projections", "packed query, key and value"):
        assert model.fusion(pattern).found == source.layer_count


def test_formats_mix_in_one_graph(source_of: SourceOf, tmp_path: Path) -> None:
    """The format of v differs from that of q and k, so nothing packs; down is weight-only."""
    source = source_of("llama")
    plan = make_plan(source.folder, floats(quant=W8A8))
    formats = {"v": QuantSpec(4, 16), "down": QuantSpec(8, 32), "o": None}
    sites = tuple(replace(site, quant=formats.get(site.members[0], W8A8)) for site in plan.sites)
    rewritten = rewrite(source, replace(plan, sites=sites))
    model, ids = OnnxModel(rewritten, tmp_path), tokens(source)
    counts = Counter(node.op_type for node in model.graph.graph)
    assert (counts["MatMulIntegerToFloat"], counts["MatMulNBits"]) == (2 * 4, 2 * 2)
    expected = logits(rewritten.model, ids)
    assert float((model.run(ids)[0] - expected).abs().max() / expected.abs().max()) < 1e-2


def test_decoding_with_a_cache_rounds_as_prefill_does(source_of: SourceOf, tmp_path: Path) -> None:
    """A scale for all tokens of a call would make a token's result depend on what is cached."""
    source = source_of("llama")
    model, ids = OnnxModel(compress(source, options("dense")), tmp_path), tokens(source)
    whole, _ = model.run(ids)
    _, past = model.run(ids[:, :5])
    for position in range(5, ids.shape[1]):
        step, past = model.run(ids[:, position : position + 1], torch.ones_like(ids[:, : position + 1]), past)
        assert float((step[:, 0] - whole[:, position]).abs().max() / whole.abs().max()) < 1e-4


@pytest.mark.parametrize("form", ["dense", "per-head"])
def test_a_loaded_checkpoint_is_the_same_model(source_of: SourceOf, tmp_path: Path, form: str) -> None:
    source = source_of("qwen2")
    rewritten, ids = compress(source, options(form)), tokens(source)
    save_pretrained(rewritten, tmp_path / "out", tokenizer_from=source.folder)
    loaded = load_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded.model, ids), logits(rewritten.model, ids))


@pytest.mark.parametrize("groups", [(), ("qk", "gate_up")])
def test_a_bundle_keeps_parity(llama: Path, tmp_path: Path, groups: tuple[str, ...]) -> None:
    report = compress_model(
        llama, tmp_path / "out", tiny_options(quant=W8A8, groups=groups), run=Run(threads=1)
    )
    tiers = {tier.tier: tier for tier in report.parity}
    assert "".join(tiers) == "0pabcdefghi"
    assert all(tier.passed for tier in tiers.values() if tier.bound is not None)
    assert tiers["c"].relative_error < 1e-5
    assert "PyTorch's own int8 inputs" in tiers["d"].note
    again = verify(tmp_path / "out", provider="cpu", run=Run(threads=1))
    assert all(tier.passed for tier in again if tier.bound is not None)
    assert all(
        tier.passed
        for tier in verify(tmp_path / "out", llama, provider="cpu", run=Run(threads=1))
        if tier.bound is not None
    )
