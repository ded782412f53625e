"""The identity form: equal to the plain factors in float64, bounded pivots, neurons renumbered, exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from compressed import INT4, OnnxModel, SourceOf, compress, floats, logits, tokens
from torch import Tensor, nn

from rk_export.errors import InputError
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import GROUPS, RankRule
from rk_export.options.recipe import Recipe
from rk_export.passes.base import Layer
from rk_export.passes.modules.factors import IdentityFactors
from rk_export.passes.modules.quantized import linear_of
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.identity_form import identity_form, refit_up
from rk_export.passes.numerics.joint_svd import joint_factors
from rk_export.passes.numerics.metric import Metric
from rk_export.passes.numerics.pivoting import exchange, greedy_groups
from rk_export.passes.numerics.ranks import break_even_rank, kept_ratio, rank_of_ratio
from rk_export.passes.weights.factorize import Factorize
from rk_export.plan import SitePlan
from rk_export.planning.planner import check_plan, decide_plan
from rk_export.rewrite import apply as rewriting
from rk_export.rewrite.apply import Rewritten
from rk_export.rewrite.checkpoint import load_pretrained, save_pretrained
from rk_export.rewrite.sizes import planned_findings
from rk_export.source.stored import StoredModel

CPU = torch.device("cpu")
BOUND = 1e-4
FORMATS = {"float": None, "int4": INT4}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graded(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return a matrix whose rows and directions differ much in norm, as weights do."""
    scale = 10.0 ** (2 * torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed + 9)).double() - 1)
    return scale * randn(rows, columns, seed=seed) * torch.linspace(1, 0.05, columns, dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 24, 10), (24, 40, 23), (300, 120, 90), (2, 5, 1)])
@pytest.mark.parametrize("paired", [False, True])
def test_it_equals_the_plain_factors(rows: int, columns: int, rank: int, paired: bool) -> None:
    rank -= paired * (rank % 2)
    if rank == 0:
        pytest.skip("no pair of pivots")
    W = graded(rows, columns)
    plain = joint_factors(W, rank)
    form = identity_form(plain.up, plain.down, paired=paired)
    product = plain.up @ plain.down
    rows_of_form = torch.cat([form.down, form.coefficients @ form.down])
    torch.testing.assert_close(rows_of_form[form.order], product, rtol=0, atol=1e-10 * float(W.norm()))
    torch.testing.assert_close(form.down, product[form.pivots], rtol=0, atol=1e-12 * float(W.norm()))
    assert form.down.shape == (rank, columns)
    assert form.coefficients.shape == (rows - rank, rank)
    assert sorted([*form.pivots.tolist(), *form.others.tolist()]) == list(range(rows))
    if paired:
        half = rank // 2
        assert torch.equal(form.pivots[:half] + rows // 2, form.pivots[half:])
    else:
        assert form.max_coefficient <= 2.0 + 1e-9
    assert form.condition == pytest.approx(float(torch.linalg.cond(plain.up[form.pivots])), rel=1e-4)


def test_greedy_pivots_are_no_worse_than_those_of_a_pivoted_qr() -> None:
    from scipy.linalg import qr

    B = graded(200, 64)
    pivots = greedy_groups(B[:, None, :])
    assert len(set(pivots.tolist())) == 64
    reference = torch.from_numpy(qr(B.T.numpy(), pivoting=True, mode="r")[1][:64].copy())
    ours, theirs = (torch.linalg.slogdet(B[rows]).logabsdet for rows in (pivots, reference))
    assert ours > theirs - 3
    generator = torch.Generator().manual_seed(0)
    at_random = torch.linalg.slogdet(B[torch.randperm(200, generator=generator)[:64]]).logabsdet
    assert ours > at_random + 20


@pytest.mark.parametrize("size", [1, 2])
def test_exchanges_bound_the_coefficients_and_stay_coefficients(size: int) -> None:
    """From a poor choice, the first rows, in which the exchanges must find the better ones."""
    B, rank = graded(60, 12), 12
    C = torch.linalg.solve(B[:rank], B[rank:], left=False)
    before = float(C.abs().max())
    left = torch.arange(rank, 60).view(-1, size)
    chosen = torch.arange(rank).view(-1, size)
    swaps = exchange(C, size, 2.0)
    for other, pivot in swaps:
        left[other], chosen[pivot] = chosen[pivot].clone(), left[other].clone()
    torch.testing.assert_close(C @ B[chosen.flatten()], B[left.flatten()], rtol=0, atol=1e-8)
    assert len(swaps) > 0
    assert float(C.abs().max()) < before
    if size == 1:
        assert float(C.abs().max()) <= 2.0


def test_dependent_pivots_give_finite_coefficients() -> None:
    low = randn(30, 3) @ randn(3, 20, seed=1)
    plain = joint_factors(low, 6)
    form = identity_form(plain.up, plain.down)
    assert torch.isfinite(form.coefficients).all()
    product = torch.cat([form.down, form.coefficients @ form.down])[form.order]
    torch.testing.assert_close(product, low, rtol=0, atol=1e-7 * float(low.norm()))
    zero = identity_form(torch.zeros(8, 2), torch.zeros(2, 5))
    assert zero.condition == float("inf")
    assert torch.count_nonzero(zero.coefficients @ zero.down) == 0


@pytest.mark.parametrize(("rank", "paired"), [(0, False), (8, False), (9, False), (3, True)])
def test_an_impossible_rank_is_refused(rank: int, paired: bool) -> None:
    with pytest.raises(ValueError, match="identity form"):
        identity_form(torch.zeros(8, rank), torch.zeros(rank, 5), paired=paired)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_refit_is_the_least_squares_solution(weighted: bool) -> None:
    W, X, down = randn(14, 10), randn(100, 10, seed=1), randn(4, 10, seed=2)
    X *= torch.linspace(0.1, 3, 10, dtype=torch.float64)
    C = X.T @ X / 100
    metric = Metric.of(C, damping=1e-12) if weighted else None
    inputs = X if weighted else torch.eye(10, dtype=torch.float64)
    expected = torch.linalg.lstsq(inputs @ down.T, inputs @ W.T).solution.T
    torch.testing.assert_close(refit_up(W, down, metric), expected, rtol=1e-6, atol=1e-6)


def test_a_refit_with_a_cross_moment_and_with_dead_rows() -> None:
    W, X, down = randn(14, 10), randn(100, 10, seed=1), randn(4, 10, seed=2)
    X0 = X + 0.3 * randn(100, 10, seed=3)
    metric = Metric.of(X.T @ X / 100, damping=1e-12)
    B = refit_up(W, down, metric, X0.T @ X / 100)
    expected = torch.linalg.lstsq(X @ down.T, X0 @ W.T).solution.T
    torch.testing.assert_close(B, expected, rtol=1e-6, atol=1e-6)
    down[1] = 0
    B = refit_up(W, down, metric)
    assert torch.isfinite(B).all()
    kept = refit_up(W, down[[0, 2, 3]], metric)
    torch.testing.assert_close(B[:, [0, 2, 3]], kept, rtol=1e-6, atol=1e-6)


def test_a_refit_after_rounding_lowers_the_error() -> None:
    W = graded(60, 40)
    plain = joint_factors(W, 24)
    form = identity_form(plain.up, plain.down)
    step = float(form.down.abs().max()) / 7
    rounded = (form.down / step).round() * step
    target = form.coefficients @ form.down
    before = float((target - form.coefficients @ rounded).norm())
    after = float((target - refit_up(target, rounded) @ rounded).norm())
    assert after < 0.9 * before


@pytest.mark.parametrize(("columns", "rows"), [(4096, 8192), (576, 768), (1536, 576), (7, 3)])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9, 0.99])
def test_ranks_of_the_identity_form(columns: int, rows: int, keep: float) -> None:
    rank = rank_of_ratio(keep, columns, rows, identity=True)
    assert kept_ratio(rank, columns, rows, identity=True) <= keep
    assert kept_ratio(rank + 1, columns, rows, identity=True) > keep or rank + 1 > min(columns, rows)
    assert rank >= rank_of_ratio(keep, columns, rows)
    assert break_even_rank(columns, rows, identity=True) == min(columns, rows)


def test_the_published_rank() -> None:
    """2501.19090: a 4096 x 4096 matrix at density 0.8 has rank 2264 instead of 1638."""
    assert rank_of_ratio(0.8, 4096, 4096, identity=True) == 2264
    assert rank_of_ratio(0.8, 4096, 4096) == 1638


class GatedMlp(nn.Module):
    """down(silu(gate x) up x), float64."""

    def __init__(self, neurons: int = 16, columns: int = 12, *, bias: bool = True) -> None:
        super().__init__()
        for name, shape in {
            "gate": (columns, neurons),
            "up": (columns, neurons),
            "down": (neurons, columns),
        }.items():
            torch.manual_seed(len(name))
            self.add_module(name, nn.Linear(*shape, bias=bias, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


MLP = {role: role for role in ("gate", "up", "down")}


def site(members: tuple[str, ...], form: str, rank: int, name: str = "") -> SitePlan:
    return SitePlan(f"layers.0.{name or '_'.join(members)}", 0, members, members, form, rank, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("members", [("gate", "up"), ("gate",), ("up",), ("down",)])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rank", [6, 7])
def test_a_site_in_identity_form_computes_what_the_plain_pair_computes(
    members: tuple[str, ...], known: bool, rank: int
) -> None:
    x = randn(5, 12, seed=3)
    outputs, findings = [], []
    for form in ("joint", "identity"):
        layer = Layer(0, GatedMlp(), 1)
        joint = Factorize("orthogonal", CPU, MLP if known else None)
        findings.append(joint.rewrite(layer, site(members, form, rank), None))
        outputs.append(layer.module(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-10)
    plain, identity = findings
    assert identity.error == plain.error
    columns, rows = (16, 12) if members == ("down",) else (12, 16 * len(members))
    assert plain.bytes_after - identity.bytes_after == rank**2 * 8
    assert identity.bytes_after == rank * (columns + rows - rank) * 8
    assert identity.details is not None
    gathered = not known or members == ("down",) or (len(members) == 2 and rank == 7)
    assert bool(identity.details["gather"]) is gathered
    assert 1 <= identity.details["condition"] < 1e6
    factors = layer.module.get_submodule("_".join(members) + "_factors")
    assert isinstance(factors, IdentityFactors)
    assert all((len(factors.runs(role)) <= 2) is not gathered for role in members)


@pytest.mark.parametrize("rewritten_before", ["down", "up"])
def test_neurons_keep_their_numbers_beside_a_rewritten_matrix(rewritten_before: str) -> None:
    x, layer = randn(5, 12, seed=3), Layer(0, GatedMlp(), 1)
    joint = Factorize("orthogonal", CPU, MLP)
    joint.rewrite(layer, site((rewritten_before,), "joint", 5), None)
    expected_layer = Layer(0, GatedMlp(), 1)
    for members, rank in (((rewritten_before,), 5), (("gate",), 6)):
        Factorize("orthogonal", CPU).rewrite(expected_layer, site(members, "joint", rank), None)
    finding = joint.rewrite(layer, site(("gate",), "identity", 6), None)
    assert finding.details is not None
    assert finding.details["gather"] == f"{rewritten_before} is rewritten already"
    torch.testing.assert_close(layer.module(x), expected_layer.module(x), rtol=0, atol=1e-10)


def test_later_sites_read_their_statistics_in_the_new_order() -> None:
    """Gate and up renumber the neurons, then down is factorized under moments taken before."""
    X = randn(400, 16, seed=5) * torch.linspace(0.05, 3, 16, dtype=torch.float64)
    X0 = X + 0.1 * randn(400, 16, seed=6)
    down = Curvature(Inputs(X.T @ X / 400, X0.T @ X / 400))
    x, outputs = randn(5, 12, seed=3), []
    for mlp in (MLP, None):
        layer, joint = Layer(0, GatedMlp(), 1), Factorize("orthogonal", CPU, mlp)
        joint.rewrite(layer, site(("gate", "up"), "identity", 6), None)
        finding = joint.rewrite(layer, site(("down",), "joint", 6), down)
        outputs.append(layer.module(x))
        assert finding.details is not None
        assert finding.details["metric"] == "inputs and target"
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-9)
    aligned = joint.aligned(site(("down",), "dense", 0), down)
    assert aligned is down


def test_gradient_moments_weigh_the_members() -> None:
    moments = {role: randn(16, 16, seed=seed) for seed, role in enumerate(("gate", "up"))}
    X = randn(100, 12, seed=8)
    statistics = Curvature(Inputs(X.T @ X / 100), {role: G @ G.T for role, G in moments.items()})
    diagonal = replace(statistics, outputs={role: G.diagonal() for role, G in statistics.outputs.items()})
    errors = []
    for given in (statistics, diagonal):
        finding = Factorize("orthogonal", CPU).rewrite(
            Layer(0, GatedMlp(), 1), site(("gate", "up"), "joint", 6), given
        )
        assert finding.details is not None
        assert finding.details["metric"] == "inputs and outputs"
        assert finding.details["orthogonality_defect"] < 1e-9
        errors.append(finding.details["weighted_error"])
    assert errors[0] != errors[1]
    with pytest.raises(ValueError, match="no gradient moment of up"):
        Factorize("orthogonal", CPU).rewrite(
            Layer(0, GatedMlp(), 1),
            site(("gate", "up"), "joint", 6),
            replace(statistics, outputs={"gate": torch.eye(16)}),
        )


def test_gradient_moments_per_kv_group() -> None:
    """Each group is factorized under the rows and columns of its own heads."""
    G = {"q": randn(16, 16, seed=1), "k": randn(8, 8, seed=2)}
    outputs = {role: M @ M.T for role, M in G.items()}
    module = nn.Module()
    for role, rows in {"q": 16, "k": 8}.items():
        module.add_module(role, nn.Linear(12, rows, bias=False, dtype=torch.float64))
    dense = {role: module.get_submodule(role).weight.detach() for role in G}  # type: ignore[union-attr]
    plan = replace(site(("q", "k"), "joint", 3, "qk"), form="per_head")
    layer = Layer(0, module, 2)
    statistics = Curvature(Inputs(torch.eye(12).double()), outputs)
    Factorize("orthogonal", CPU).rewrite(layer, plan, statistics)
    second = list(module.get_submodule("qk_factors").pairs())[1]  # type: ignore[operator]
    W = torch.cat([dense["q"][8:], dense["k"][4:]])
    blocks = [Metric.of(outputs["q"][8:, 8:]), Metric.of(outputs["k"][4:, 4:])]
    expected = joint_factors(W, 3, inputs=Metric.of(torch.eye(12)), outputs=Metric.stacked(blocks))
    actual = torch.cat([second.ups[role].weight for role in G]) @ second.down.weight
    torch.testing.assert_close(actual, expected.up @ expected.down)


def test_runs_and_order_of_a_member() -> None:
    down, rest = linear_of(randn(2, 3)), linear_of(randn(3, 2, seed=1))
    orders = {"a": torch.tensor([0, 2, 3]), "b": torch.tensor([4, 1])}
    factors = IdentityFactors(down, rest, orders, {"a": None, "b": torch.tensor([1.0, 2.0])})
    assert factors.runs("a") == [(0, 1), (2, 4)]
    assert factors.runs("b") == [(4, 5), (1, 2)]
    x = randn(4, 3, seed=2)
    z = x @ down.weight.T
    full = torch.cat([z, z @ rest.weight.T], dim=-1)
    torch.testing.assert_close(factors.member("a", x), full[:, [0, 2, 3]])
    torch.testing.assert_close(factors.member("b", x), full[:, [4, 1]] + torch.tensor([1.0, 2.0]))


@pytest.fixture(params=["gathered", "renumbered"])
def renumbering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the pass knows the FFN's matrices, so that it may renumber the neurons."""
    known = str(request.param) == "renumbered"
    if not known:
        monkeypatch.setattr(rewriting, "Factorize", lambda gauge, device, mlp: Factorize(gauge, device))
    return known


def identity_options(groups: tuple[str, ...], bits: str, **changes: object) -> Recipe:
    fields = {"rank": RankRule("keep", 0.8), "rank_multiple": 2, "quant": FORMATS[bits], **changes}
    return floats(groups, form="identity", **fields)


@pytest.mark.whole
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("groups", [("qk", "gate_up"), ("qkv", "o", "gate", "down")])
def test_the_graph_computes_what_pytorch_computes(
    source_of: SourceOf, tmp_path: Path, renumbering: bool, groups: tuple[str, ...], bits: str
) -> None:
    source = source_of("llama")
    rewritten = compress(source, identity_options(groups, bits))
    ids, model = tokens(source), OnnxModel(rewritten, tmp_path)
    expected = logits(rewritten.model, ids)
    assert float((model.run(ids)[0] - expected).abs().max()) <= BOUND * float(expected.abs().max())
    assert model.fusion("shared down-projection").found == len(groups) * source.layer_count
    in_order = {"gate", "up"} if renumbering else set()
    gathered = [role for group in groups for role in GROUPS[group] if role not in in_order]
    orders = [name for name in model.graph.graph.initializers if ".order" in name]
    assert len(orders) == source.layer_count * len(gathered)


@pytest.mark.whole
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert", "gemma3"])
def test_other_families(source_of: SourceOf, tmp_path: Path, family: str) -> None:
    """Biases, MLPs without a gate, an encoder, norms of queries and keys."""
    source = source_of(family)
    groups = {"qwen2": ("qkv", "gate_up"), "gpt2": ("qk", "up", "down"), "bert": ("qk",)}.get(family, ("qk",))
    rewritten = compress(source, identity_options(groups, "int4"))
    ids, model = tokens(source), OnnxModel(rewritten, tmp_path)
    expected = logits(rewritten.model, ids)
    assert float((model.run(ids)[0] - expected).abs().max()) <= BOUND * float(expected.abs().max())


def test_plain_and_identity_of_one_rank_have_the_same_logits(source_of: SourceOf, renumbering: bool) -> None:
    source = source_of("llama")
    options = identity_options(("qk", "gate_up"), "float", rank=RankRule("rank", 24))
    forms: tuple[Literal["plain", "identity"], ...] = ("plain", "identity")
    ids = tokens(source)
    plain, identity = (
        compress(source, options.with_step(replace(options.factorize, form=form))).model for form in forms
    )
    expected = logits(plain, ids)
    assert float((logits(identity, ids) - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.mark.whole
@pytest.mark.parametrize("bits", FORMATS)
def test_a_checkpoint_comes_back(source_of: SourceOf, tmp_path: Path, renumbering: bool, bits: str) -> None:
    source = source_of("qwen2")
    rewritten = compress(source, identity_options(("qk", "gate_up", "down"), bits))
    save_pretrained(rewritten, tmp_path / "out", tokenizer_from=source.folder)
    loaded, ids = load_pretrained(tmp_path / "out"), tokens(source)
    assert torch.equal(logits(loaded.model, ids), logits(rewritten.model, ids))
    expected, actual = (
        OnnxModel(model, folder(tmp_path, name)) for model, name in ((rewritten, "a"), (loaded, "b"))
    )
    assert torch.equal(expected.run(ids)[0], actual.run(ids)[0])


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def stored(rewritten: Rewritten, target: str) -> int:
    matching = [finding for finding in rewritten.findings if finding.target == target]
    return matching[-1].bytes_after


@pytest.mark.parametrize("bits", FORMATS)
def test_planned_sizes_are_those_that_come_out(source_of: SourceOf, bits: str) -> None:
    source = source_of("llama")
    options = identity_options(("qk", "gate_up"), bits)
    plan = decide_plan(source, options)
    rewritten = compress(source, options)
    planned = {finding.target: finding.bytes_after for finding in planned_findings(source, plan)}
    for planned_site in plan.sites:
        if planned_site.form == "identity":
            assert planned[planned_site.site] == stored(rewritten, planned_site.site)


def test_planned_ranks(source_of: SourceOf) -> None:
    source = source_of("llama")
    plan = decide_plan(source, identity_options(("qk",), "float", rank_multiple=1))
    (first, *_) = plan.sites
    assert (first.form, first.rank) == ("identity", rank_of_ratio(0.8, 64, 96, identity=True))
    check_plan(source, plan)
    o_plan = decide_plan(source, identity_options(("o",), "float", rank=RankRule("rank", 63)))
    check_plan(source, o_plan)
    sites = tuple(replace(item, rank=64) if item.form == "identity" else item for item in o_plan.sites)
    with pytest.raises(InputError, match="exceeds the full rank 63"):
        check_plan(source, replace(o_plan, sites=sites))
    with pytest.raises(InputError, match="takes q and k whole"):
        decide_plan(source, identity_options(("qk",), "float", qk="per-head"))


@pytest.mark.whole
def test_a_quantized_block_of_another_format_packs_nothing(source_of: SourceOf, tmp_path: Path) -> None:
    """The pivot block packs with a dense matrix of its own format, and the count is that of the plan."""
    source: StoredModel = source_of("llama")
    plan = decide_plan(source, identity_options(("qk",), "int4"))
    for v_format, packs in ((INT4, 2), (QuantSpec(8, 32), 1)):
        sites = tuple(
            replace(item, quant=v_format) if item.members == ("v",) else item for item in plan.sites
        )
        model = OnnxModel(rewriting.rewrite(source, replace(plan, sites=sites)), folder(tmp_path, str(packs)))
        assert model.fusion("packed projections").found == packs * source.layer_count
