"""What the export modules declare is what the graph is held to: every way to differ is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
from compressed import INT4, OnnxModel, SourceOf, compress, floats

from rk_export.errors import FusionError
from rk_export.graph import swap
from rk_export.graph.build import build_graph
from rk_export.graph.dense.attention import ATTENTION
from rk_export.graph.dense.decoder import SKIP_NORM
from rk_export.graph.dense.frontend import build_module
from rk_export.graph.expected import declared
from rk_export.graph.modules import projections
from rk_export.graph.modules.base import Pattern, operators
from rk_export.graph.modules.projections import NBITS, DenseProjection, QuantizedProjection
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.passes.graph.packing import Product
from rk_export.rewrite.apply import Rewritten

LAYERS = 2


@pytest.fixture
def int4(source_of: SourceOf) -> Rewritten:
    return compress(source_of("llama"), floats(quant=INT4, table=QuantSpec(8, 16)))


@pytest.mark.parametrize(
    ("family", "norms"),
    [("llama", 2 * LAYERS), ("opt", 2 * LAYERS + 1), ("olmo2", 1), ("granite", 2 * LAYERS)],
)
def test_the_dense_decoder_declares_its_attention_and_its_sums_with_norms(
    source_of: SourceOf, family: str, norms: int
) -> None:
    module = build_module(source_of(family).description, ep="cpu", dtype="fp32").module
    assert declared(module) == Counter({ATTENTION: LAYERS, SKIP_NORM: norms})


@pytest.mark.whole
def test_a_form_that_declares_more_than_it_emits_is_an_error(
    int4: Rewritten, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuantizedProjection, "emits", lambda self: Counter({NBITS: 2}))
    with pytest.raises(FusionError, match="planned 30, found 15") as caught:
        build_graph(int4)
    assert caught.value.where == "MatMulNBits"


@pytest.mark.whole
def test_products_that_nobody_declared_are_an_error(int4: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantizedProjection, "products", lambda self, source: ())
    with pytest.raises(FusionError, match="planned 0, found 4") as caught:
        build_graph(int4)
    assert caught.value.where == "packed projections"


@pytest.mark.whole
def test_marks_lost_on_the_way_are_an_error(int4: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "mark", lambda value, site: value)
    with pytest.raises(FusionError, match="planned 4, found 0") as caught:
        build_graph(int4)
    assert caught.value.where == "packed projections"


def test_members_of_a_site_declare_what_they_share_once(source_of: SourceOf) -> None:
    rewritten = compress(source_of("llama"), floats(("qk",), rank=RankRule("rank", 8)))
    module = build_module(rewritten.description, ep="cpu", dtype="fp32")
    swap.swap_projections(rewritten, module, group_experts=True)
    attention = module.module.model.layers[0].self_attn
    q, k, v = (child.products("input") for child in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert q[0] == k[0]
    assert [product.part for product in (*q, *k, *v)] == [
        "factor_down",
        "factor_up_q",
        "factor_down",
        "factor_up_k",
        "v",
    ]
    assert q[1].source == k[1].source != q[0].source == v[0].source == "input"


class Negated(DenseProjection):
    """A stored form that nothing else knows: the product by -W and its negation."""

    PATTERN = operators("negations", "", "Neg")

    def emits(self) -> Counter[Pattern]:
        return Counter({self.PATTERN: 1})

    def products(self, source: Hashable) -> tuple[Product, ...]:
        del source
        return ()

    def forward(self, op: Any, x: Any) -> Any:
        return op.Neg(op.MatMul(x, self.weight))


@pytest.mark.whole
def test_a_new_form_declares_itself_in_its_own_module(
    source_of: SourceOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten = compress(source_of("llama"), floats())
    monkeypatch.setattr(swap, "projection", lambda module, site, level: Negated(module, site))
    _, fusions = build_graph(rewritten)
    found = {fusion.pattern: (fusion.planned, fusion.found) for fusion in fusions}
    assert found["negations"] == (7 * LAYERS, 7 * LAYERS)
    assert found["packed projections"] == (0, 0)


@pytest.mark.whole
@pytest.mark.parametrize("quant", [None, INT4], ids=["floats", "int4"])
def test_attention_takes_its_pack_where_the_mlp_reads_the_same_norm(
    source_of: SourceOf, tmp_path: Path, quant: QuantSpec | None
) -> None:
    """All five products read one value; q, k and v are one of their own, which attention reads without a Split."""
    source = source_of("cohere")
    model = OnnxModel(compress(source, floats((), quant=quant)), tmp_path)
    assert model.fusion("packed query, key and value").found == source.layer_count
    assert model.fusion("packed projections").found == 2 * source.layer_count
