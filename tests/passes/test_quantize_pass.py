"""The quantization passes: what they replace, what they report, and tied tables."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed import INT4, SourceOf, compress, floats, tokens
from made_recipes import made_recipe
from tiny_models import FAMILIES
from torch import nn

from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.passes.base import Layer, run_weight_pass
from rk_export.passes.modules.factors import JointMember
from rk_export.passes.modules.quantized import QuantizedEmbedding, QuantizedLinear
from rk_export.passes.weights.factorize import Factorize
from rk_export.passes.weights.quantize import Quantize, matrix_paths
from rk_export.plan import SitePlan
from rk_export.rewrite.apply import Rewritten

CPU = torch.device("cpu")
RANK_8 = RankRule("rank", 8)
INT8 = QuantSpec(8, 32)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the dense or dequantized weight of every linear and embedding by its path."""
    kinds = nn.Linear | nn.Embedding | QuantizedLinear | QuantizedEmbedding
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, kinds)}


def products(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return what a site's matrices multiply by: each of them, or B A of every factor pair."""
    downs = {name.removesuffix(".down"): weight for name, weight in weights.items() if name.endswith(".down")}
    if not downs:
        return list(weights.values())
    return [weight @ downs[name.split(".ups.")[0]] for name, weight in weights.items() if ".ups." in name]


@pytest.mark.parametrize("form", ["dense", "joint", "per_head"])
@pytest.mark.parametrize("spec", [INT4, QuantSpec(8, 32, symmetric=False), QuantSpec(2, 16)], ids=str)
def test_every_matrix_of_a_site_is_rounded_and_counted(form: str, spec: QuantSpec) -> None:
    torch.manual_seed(0)
    module = nn.Module()
    module.q_proj, module.k_proj = nn.Linear(48, 32), nn.Linear(48, 16)
    layer = Layer(0, module, kv_groups=2)
    plan = SitePlan(
        "layers.0.qk", 0, ("q", "k"), ("q_proj", "k_proj"), form, 0 if form == "dense" else 8, spec
    )  # type: ignore[arg-type]
    run_weight_pass(Factorize("balanced", CPU), layer, [plan], {})
    before = {name: weight.detach().clone() for name, weight in weights(module).items()}
    (finding,) = run_weight_pass(Quantize(torch.float32, CPU), layer, [plan], {})

    after = weights(module)
    assert after.keys() == before.keys()
    assert set(matrix_paths(layer, plan)) == set(after)
    assert all(isinstance(module.get_submodule(name), QuantizedLinear) for name in after)
    difference = torch.cat(
        [(now - then).flatten() for now, then in zip(products(after), products(before), strict=True)]
    )
    norm = torch.cat([product.flatten() for product in products(before)]).norm()
    assert finding.error == pytest.approx(float(difference.norm() / norm), rel=1e-5)
    stored = [tensor for name, tensor in module.state_dict().items() if not name.endswith("bias")]
    assert finding.bytes_after == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert finding.bytes_before == sum(4 * weight.numel() for weight in before.values())
    assert finding.details == {
        "pass": "quantize",
        "bits": spec.bits,
        "block": spec.block_size,
        "quantizer": "rtn",
    }


def test_biases_stay_in_floats() -> None:
    linear = nn.Linear(48, 32)
    layer = Layer(0, nn.ModuleDict({"up": linear}), 1)
    Quantize(torch.float16, CPU).rewrite(
        layer, SitePlan("layers.0.up", 0, ("up",), ("up",), "dense", 0, INT4), None
    )
    quantized = layer.module["up"]
    assert isinstance(quantized, QuantizedLinear)
    assert quantized.scales.dtype == torch.float16
    assert quantized.bias is not None
    assert torch.equal(quantized.bias, linear.bias)


def test_a_site_without_quantization_is_left_alone() -> None:
    plan = SitePlan("layers.0.q", 0, ("q",), ("q_proj",), "dense", 0, quant=None)
    assert not Quantize(torch.float32, CPU).applies(plan)
    with pytest.raises(ValueError, match="no quantization planned"):
        Quantize(torch.float32, CPU).rewrite(Layer(0, nn.Module(), 1), plan, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_planned_matrix_of_a_family_is_quantized(source_of: SourceOf, family: str) -> None:
    """What stays in floats are routers and what an encoder has around its layers beside the token table."""
    source = source_of(family)
    rewritten = compress(source, floats(("qk",), rank=RANK_8, quant=INT4, table=INT8))
    left = {
        name
        for name, module in rewritten.model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    if source.architecture.is_encoder:
        assert left == {"embeddings.position_embeddings", "embeddings.token_type_embeddings"}
        return
    allowed = {"transformer.wpe", "model.decoder.embed_positions"}
    assert {name for name in left if not name.endswith("mlp.gate")} <= allowed
    assert [module.spec for module in (embedding_of(rewritten), head_of(rewritten))] == [INT8, INT8]
    sites = {
        finding.target for finding in rewritten.findings if (finding.details or {}).get("pass") == "quantize"
    }
    assert sites >= {site.site for site in rewritten.plan.sites}


def embedding_of(rewritten: Rewritten) -> QuantizedEmbedding:
    module = rewritten.model.get_submodule(rewritten.architecture.embedding)
    assert isinstance(module, QuantizedEmbedding)
    return module


def head_of(rewritten: Rewritten) -> QuantizedLinear:
    module = rewritten.model.get_submodule(rewritten.architecture.lm_head or "")
    assert isinstance(module, QuantizedLinear)
    return module


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_stored_once(source_of: SourceOf, tied: bool) -> None:
    source = source_of("llama", tie_word_embeddings=tied)
    rewritten = compress(source, floats(table=INT8))
    embedding, head = embedding_of(rewritten), head_of(rewritten)
    assert (head.codes.data_ptr() == embedding.codes.data_ptr()) is tied
    tables = [finding for finding in rewritten.findings if finding.bytes_before]
    assert len(tables) == (1 if tied else 2)
    assert all(finding.bytes_before == 4 * 160 * 64 for finding in tables)
    assert all(0 < (finding.error or 0) < 0.01 for finding in tables)


def test_gemmas_embedding_keeps_its_factor(source_of: SourceOf) -> None:
    source = source_of("gemma3")
    ids = tokens(source)
    dense, quantized = source.load(), compress(source, floats(table=INT8)).model
    expected = dense.get_input_embeddings()(ids)
    actual = quantized.get_submodule(source.architecture.embedding)(ids)
    assert float((actual - expected).norm() / expected.norm()) < 0.01
    assert float(expected.abs().max()) > 6  # 0.25 * 3 * sqrt(64): the factor is in


def test_eight_bits_lose_about_a_sixteenth_of_what_four_lose(source_of: SourceOf) -> None:
    source = source_of("llama")
    dense, errors = weights(source.load()), {}
    for bits in (4, 8):
        spec = QuantSpec(bits, 16)
        rounded = weights(compress(source, floats(quant=spec, table=spec)).model)
        errors[bits] = float(torch.stack([(rounded[name] - dense[name]).norm() for name in dense]).norm())
    assert 12 < errors[4] / errors[8] < 20


def test_members_of_a_joint_site_read_quantized_factors(source_of: SourceOf) -> None:
    options = made_recipe(groups=("qk", "gate_up"), rank=RANK_8, quant=INT4, table=None)
    model = compress(source_of("llama"), options).model
    members = [module for module in model.modules() if isinstance(module, JointMember)]
    assert len(members) == 2 * 4
    pairs = itertools.chain.from_iterable(member.factors.pairs() for member in members)
    assert all(
        isinstance(module, QuantizedLinear) for pair in pairs for module in (pair.down, *pair.ups.values())
    )
