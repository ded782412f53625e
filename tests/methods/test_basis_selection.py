"""Basis selection on whole models: the task is learned, what is kept meets the rule, and runs go on exactly."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from compressed import SourceOf, floats, logits, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.errors import InputError
from rk_export.methods.basel.modules import BasisLinear
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.basel.selection import Selection, select_basis
from rk_export.methods.basel.training import BasisTraining
from rk_export.options.ranks import GROUPS, SINGLE_GROUPS, RankRule
from rk_export.options.texts import TextFile
from rk_export.passes.numerics.joint_svd import joint_factors
from rk_export.planning.planner import decide_plan
from rk_export.report.records import Outcome
from rk_export.rewrite.apply import rewrite
from rk_export.source.replaced import Replaced
from rk_export.source.stored import StoredModel
from rk_export.training.next_token import backward_next_token

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
HALF = RankRule("keep", 0.5)
TASK = TextFile("task.txt", "0" * 64)
OPTIONS = BaselOptions(TASK, keep=0.5, steps=12, events=6, batch_tokens=64, new_basis=4, learning_rate=0.03)


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 on every machine."""
    monkeypatch.setattr("rk_export.methods.basel.selection.matmul_dtype", lambda _: torch.float32)


def task(source: StoredModel) -> Tensor:
    """Token ids of a task that can be learned: a few words in a fixed order, from any of them on."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randperm(source.config.vocab_size - 3, generator=generator)[:12] + 3
    return torch.stack([words.roll(-shift).repeat(2)[:16] for shift in range(12)])


def selected(
    source: StoredModel, options: BaselOptions = OPTIONS, rank: RankRule = HALF, **arguments: Any
) -> Selection:
    return select_basis(source, task(source), rank, options, device=CPU, **arguments)


def loss_of(model: PreTrainedModel, ids: Tensor) -> float:
    flat = logits(model, ids)[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(flat, ids[:, 1:].flatten()))


def tuned(source: StoredModel, selection: Selection) -> PreTrainedModel:
    return source.then(Replaced(selection.tensors)).load()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite", "phi3", "gpt2", "opt"])
def test_the_task_is_learned_while_parameters_go(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    before = loss_of(source.load(), task(source))
    selection = selected(source, replace(OPTIONS, steps=30))
    assert loss_of(tuned(source, selection), task(source)) < 0.7 * before
    assert kept_share(source, selection) <= 0.5
    assert kept_share(source, selection) > 0.47
    assert selection.finding.details is not None
    assert selection.finding.details["kept"] == pytest.approx(kept_share(source, selection))
    assert [step for step, _ in selection.losses] == list(range(1, 31))


def kept_share(source: StoredModel, selection: Selection) -> float:
    """Return what factor pairs of the ranks hold, over the dense matrices."""
    kept = dense = 0
    for (layer, path), rank in selection.ranks.items():
        rows, columns = selection.tensors[f"layers.{layer}.{path}.weight"].shape
        kept += (rows + columns) * rank or rows * columns
        dense += rows * columns
    assert len(selection.ranks) == source.layer_count * len(source.architecture.projections(source.config, 0))
    return kept / dense


@pytest.mark.parametrize("importance", ["magnitude", "gradient", "second-order"])
def test_every_importance_selects(source_of: SourceOf, importance: Any) -> None:
    source = source_of("llama")
    before = loss_of(source.load(), task(source))
    selection = selected(source, replace(OPTIONS, importance=importance, steps=30))
    assert loss_of(tuned(source, selection), task(source)) < 0.7 * before
    assert 0.47 < kept_share(source, selection) <= 0.5


def test_importances_select_differently(source_of: SourceOf) -> None:
    source = source_of("llama")
    choices: list[Any] = ["magnitude", "gradient", "second-order"]
    found = [selected(source, replace(OPTIONS, importance=choice)).ranks for choice in choices]
    assert found[0] != found[1] != found[2] != found[0]


def test_before_any_training_the_model_is_the_dense_one(source_of: SourceOf) -> None:
    """A rule that keeps nearly everything and a rate of nearly zero change nearly nothing."""
    source, ids = source_of("qwen2"), tokens(source_of("qwen2"))
    options = replace(OPTIONS, steps=1, learning_rate=1e-12)
    model = tuned(source, selected(source, options, RankRule("energy", 1 - 1e-12)))
    expected = logits(source.load(), ids)
    assert torch.allclose(logits(model, ids), expected, atol=1e-4 * float(expected.abs().max()))


def test_biases_and_norms_are_kept_and_trained(source_of: SourceOf) -> None:
    source = source_of("qwen2")
    selection = selected(source)
    dense = source.load()
    names = [f"layers.{i}.self_attn.{x}_proj.bias" for i in range(2) for x in "qkv"]
    norms = [f"layers.{i}.{name}_layernorm.weight" for i in range(2) for name in ("input", "post_attention")]
    for name in [*names, *norms, "model.norm.weight"]:
        before = dense.get_parameter(name if name.startswith("model") else f"model.{name}")
        assert selection.tensors[name].shape == before.shape
        assert not torch.equal(selection.tensors[name], before)
        both = torch.stack([selection.tensors[name], before.detach()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.5  # moved, not made anew
    assert not any("embed" in name or "lm_head" in name for name in selection.tensors)
    assert len(selection.tensors) == 2 * 7 + len(names) + len(norms) + 1


def _groups_of(source: StoredModel) -> tuple[str, ...]:
    roles = {item.role for item in source.description.projections(0)}
    return tuple(group for group in SINGLE_GROUPS if {*GROUPS[group]} <= roles)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_factor_pairs_of_those_ranks_compute_the_same(source_of: SourceOf, family: str) -> None:
    """The second SVD, by the pass that factorizes any model, loses nothing."""
    source = source_of(family)
    selection = selected(source)
    tuned_source = source.then(Replaced(selection.tensors))
    plan = decide_plan(tuned_source, floats(_groups_of(source), rank=RankRule("rank", 1), rank_multiple=1))
    sites = tuple(replace(site, rank=selection.ranks[site.layer, site.paths[0]]) for site in plan.sites)
    assert all(site.form == "joint" for site in sites)
    rewritten = rewrite(tuned_source, replace(plan, sites=sites))
    ids = tokens(source)
    expected = logits(tuned_source.load(), ids)
    assert torch.allclose(logits(rewritten.model, ids), expected, atol=1e-4 * float(expected.abs().max()))
    errors = [finding.error for finding in rewritten.findings if finding.error is not None]
    assert len(errors) == 14
    assert max(errors) < 1e-5


@pytest.mark.parametrize("tune", [0, 3])
def test_matrices_have_the_rank_that_is_said(source_of: SourceOf, tune: int) -> None:
    selection = selected(source_of("llama"), replace(OPTIONS, tune=tune))
    for (layer, path), rank in selection.ranks.items():
        W = selection.tensors[f"layers.{layer}.{path}.weight"]
        assert W.dtype == torch.float32
        assert joint_factors(W.double(), rank).weighted_error < 1e-6
        assert joint_factors(W.double(), rank - 1).weighted_error > 1e-4
    assert len(selection.losses) == 12 + tune


def test_tuning_trains_the_directions(source_of: SourceOf) -> None:
    """The column space of a tuned matrix leaves that of the dense one's directions by more than the new bases."""
    source = source_of("llama")
    plain, longer = (selected(source, replace(OPTIONS, new_basis=0, tune=tune)) for tune in (0, 6))
    assert plain.ranks == longer.ranks
    name = "layers.0.mlp.up_proj.weight"
    U = torch.linalg.svd(source.load().get_parameter(f"model.{name}").double()).U

    def correlated(selection: Selection) -> float:
        """Return how far the left singular vectors mix those of the dense matrix."""
        mixed = U.T @ torch.linalg.svd(selection.tensors[name].double()).U[:, : plain.ranks[0, "mlp.up_proj"]]
        return float((1 - mixed.square().max(0).values).max())

    assert correlated(plain) < 1e-4
    assert correlated(longer) > 1e-3
    assert loss_of(tuned(source, longer), task(source)) < loss_of(tuned(source, plain), task(source))


def test_energy_keeps_the_fraction_of_every_matrix(source_of: SourceOf) -> None:
    """With a rate of nearly zero the importances stay: each matrix keeps the largest that reach K."""
    source = source_of("llama")
    options = replace(OPTIONS, learning_rate=1e-12, new_basis=1)
    selection = selected(source, options, RankRule("energy", 0.4))
    model = source.load()
    for (layer, path), rank in selection.ranks.items():
        values = torch.linalg.svdvals(model.get_parameter(f"model.layers.{layer}.{path}.weight").double())
        share = values.cumsum(0) / values.sum()
        assert rank == int((share < 0.4).sum()) + 1 + 1


def test_a_matrix_whose_pair_saves_nothing_stays_dense(source_of: SourceOf) -> None:
    source = source_of("llama")
    selection = selected(source, rank=RankRule("energy", 0.9))
    details = selection.finding.details
    assert details is not None
    whole = [f"layers.{layer}.{path}" for (layer, path), rank in selection.ranks.items() if rank == 0]
    assert whole
    assert details["dense"] == {"why": "a factor pair would be no smaller", "matrices": whole}
    assert kept_share(source, selection) <= 1
    assert details["kept"] == pytest.approx(kept_share(source, selection))


def test_a_large_share_is_used_though_some_matrices_stay_dense(source_of: SourceOf) -> None:
    source = source_of("llama")
    selection = selected(source, rank=RankRule("keep", 0.93))
    assert 0 in selection.ranks.values()
    assert 0.915 < kept_share(source, selection) <= 0.93
    assert selection.finding.outcome is Outcome.APPLIED


def test_the_pairs_shrink_step_by_step(source_of: SourceOf, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    take = BasisTraining._take_step

    def step(training: BasisTraining, loss: float) -> None:
        shares.append(training.share)
        take(training, loss)

    monkeypatch.setattr(BasisTraining, "_take_step", step)
    selected(source_of("llama"))
    assert shares[0] > 1.4
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 7  # six events and the beginning
    assert shares[-1] <= 0.5
    assert shares[9] == shares[-1]  # nothing after three quarters
    levels = sorted(set(shares), reverse=True)
    ratios = [after / before for before, after in itertools.pairwise(levels)]
    assert max(ratios) - min(ratios) < 0.05


def test_the_same_seed_gives_the_same_selection(source_of: SourceOf) -> None:
    source = source_of("llama")
    first, again, other = (selected(source, replace(OPTIONS, seed=seed)) for seed in (0, 0, 1))
    assert first.losses == again.losses
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())
    assert first.losses != other.losses


def test_the_rate_stays_while_directions_are_dropped(
    source_of: SourceOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, rate = [], BasisTraining._rate

    def watched(training: BasisTraining) -> float:
        rates.append(rate(training))
        return rates[-1]

    monkeypatch.setattr(BasisTraining, "_rate", watched)
    selected(source_of("llama"), replace(OPTIONS, steps=40, tune=20))
    assert rates[:2] == sorted(rates[:2])
    assert rates[0] < 0.5
    assert set(rates[2:31]) == {1.0}
    assert rates[30:40] == sorted(rates[30:40], reverse=True)
    assert rates[39] < 0.05 < rates[35]
    assert rates[40] < 1 == rates[41]
    assert rates[41:] == sorted(rates[41:], reverse=True)
    assert rates[59] < 0.05


def test_the_seed_draws_the_new_bases(source_of: SourceOf) -> None:
    """With one sequence there is no order: what differs are the new bases, and with them the second loss but one."""
    source = source_of("llama")
    runs = [
        select_basis(source, task(source)[:1], HALF, replace(OPTIONS, steps=3, seed=seed), device=CPU).losses
        for seed in (0, 1)
    ]
    assert runs[0][0] == runs[1][0]
    assert runs[0][2] != runs[1][2]


def test_sequences_beyond_those_taken_together_are_accumulated(
    source_of: SourceOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = source_of("llama"), dict[int, list[Tensor]]()
    observe = BasisLinear.observe

    def watched(module: BasisLinear) -> None:
        seen[together].append(cast(Tensor, module.coefficients.grad).clone())
        observe(module)

    monkeypatch.setattr(BasisLinear, "observe", watched)
    for together in (64, 16):
        seen[together] = []
        monkeypatch.setattr("rk_export.training.loop._TOKENS_TOGETHER", together)
        selected(source, replace(OPTIONS, steps=1))
    assert len(seen[64]) == len(seen[16]) == 14
    for whole, parts in zip(seen[64], seen[16], strict=True):
        assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_the_optimizers_moments_shrink_with_the_directions(
    source_of: SourceOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink, checked = BasisTraining._shrink, []

    def watched(training: BasisTraining, module: BasisLinear, index: Tensor) -> None:
        before = training._optimizer.state[module.coefficients]["exp_avg_sq"].clone()
        shrink(training, module, index)
        assert torch.equal(training._optimizer.state[module.coefficients]["exp_avg_sq"], before[index])
        checked.append(index.tolist() != list(range(len(index))))

    monkeypatch.setattr(BasisTraining, "_shrink", watched)
    selected(source_of("llama"), replace(OPTIONS, importance="gradient"))
    assert any(checked)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "opt"])
def test_the_loss_and_its_gradient_are_those_of_whole_logits(source_of: SourceOf, family: str) -> None:
    from rk_export.training.distillation import Head, last_hidden

    source = source_of(family)
    model, ids = source.load(), tokens(source, 3, 16)
    weight = (
        model.get_submodule(f"{source.architecture.layers}.0")
        .get_submodule(source.architecture.attention[0][1])
        .weight
    )
    weight.requires_grad_(True)
    head = Head(model, source.description, CPU, torch.float32)
    loss = backward_next_token(last_hidden(model, ids), head, ids, share=0.5)
    flat = model(ids).logits[:, :-1].flatten(0, 1)
    whole = nn.functional.cross_entropy(flat, ids[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(0.5 * whole, weight)
    assert loss == pytest.approx(float(whole.detach()), rel=1e-4)
    assert torch.allclose(weight.grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("stop", [2, 5, 12, 14])
def test_a_run_that_goes_on_equals_one_that_never_stopped(
    source_of: SourceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, stop: int
) -> None:
    """Stopped before and after events, at the end of the first phase, and in the second."""
    options = replace(OPTIONS, tune=4, importance="second-order")
    source, state = source_of("qwen2"), tmp_path / "deep" / "basel.pt"
    whole = selected(source, options)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            selected(source, options, state=state)
    with caplog.at_level(logging.INFO, "rk_export.training.loop"):
        resumed = selected(source, options, state=state)
    assert f"goes on after step {stop}" in caplog.text
    assert resumed.losses == whole.losses
    assert resumed.ranks == whole.ranks
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in whole.tensors.items())


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Write the state after every step, and interrupt the next one after `steps`."""
    monkeypatch.setattr("rk_export.training.state._SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr("rk_export.training.state._LARGEST_SHARE", float("inf"))
    optimize, taken = torch.optim.AdamW.step, []

    def step(optimizer: torch.optim.AdamW) -> None:
        optimize(optimizer)
        taken.append(1)
        if len(taken) > steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def test_a_finished_run_is_not_repeated(
    source_of: SourceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, state = source_of("llama"), tmp_path / "basel.pt"
    first = selected(source, replace(OPTIONS, steps=3), state=state)
    monkeypatch.setattr(BasisTraining, "_take_step", None)
    again = selected(
        source, replace(OPTIONS, steps=3, target=replace(TASK, name="elsewhere.txt")), state=state
    )
    assert again.losses == first.losses
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())


@pytest.mark.parametrize("change", ["options", "rank", "tokens", "model"])
def test_the_state_of_another_run_is_refused(source_of: SourceOf, tmp_path: Path, change: str) -> None:
    source, state, options = source_of("llama"), tmp_path / "basel.pt", replace(OPTIONS, steps=2)
    selected(source, options, state=state)
    written = state.read_bytes()
    ids, rank = task(source), RankRule("keep", 0.6 if change == "rank" else 0.5)
    if change == "tokens":
        ids = ids.flip(0)
    if change == "model":
        norm = source.load().get_parameter("model.norm.weight")
        source = source.then(Replaced({"model.norm.weight": norm + 1}))
    if change == "options":
        options = replace(options, seed=1)
    with pytest.raises(InputError, match="state of another basis selection"):
        select_basis(source, ids, rank, options, device=CPU, state=state)
    assert state.read_bytes() == written


def test_a_damaged_state_is_refused(source_of: SourceOf, tmp_path: Path) -> None:
    (tmp_path / "basel.pt").write_bytes(b"no state")
    with pytest.raises(InputError, match="is no state of a basis selection"):
        selected(source_of("llama"), state=tmp_path / "basel.pt")


@pytest.mark.parametrize(
    ("family", "rank", "changes", "message"),
    [
        ("bert", HALF, {}, "encoder"),
        ("mixtral", HALF, {}, "experts"),
        ("qwen3_moe", HALF, {}, "experts"),
        ("llama", RankRule("rank", 8), {}, "one rank 8"),
        ("llama", RankRule("keep", 0.04), {"new_basis": 1}, "hold 0.0[5-9]"),
        ("llama", RankRule("keep", 0.5), {"new_basis": 32}, "smaller rank"),
    ],
)
def test_what_cannot_be_selected_is_refused_before_work(
    source_of: SourceOf,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    rank: RankRule,
    changes: dict[str, Any],
    message: str,
) -> None:
    source = source_of(family)
    monkeypatch.setattr(StoredModel, "load", lambda _: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message):
        select_basis(source, tokens(source), rank, replace(OPTIONS, **changes), device=CPU)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(0, 8, dtype=torch.int64),
        torch.zeros(2, 1, dtype=torch.int64),
        torch.zeros(2, 129, dtype=torch.int64),
        torch.full((2, 8), 160),
        torch.full((2, 8), -1),
    ],
)
def test_tokens_that_do_not_fit_are_refused(source_of: SourceOf, ids: Tensor) -> None:
    with pytest.raises(InputError, match="token"):
        select_basis(source_of("llama"), ids, HALF, OPTIONS, device=CPU)


def test_a_loss_that_is_not_finite_ends_the_run(source_of: SourceOf) -> None:
    with pytest.raises(InputError, match="smaller learning rate"):
        selected(source_of("llama"), replace(OPTIONS, learning_rate=1e30))


def test_bf16_products_learn_too(source_of: SourceOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rk_export.methods.basel.selection.matmul_dtype", lambda _: torch.bfloat16)
    source = source_of("llama")
    before = loss_of(source.load(), task(source))
    selection = selected(source, replace(OPTIONS, steps=30, tune=2))
    assert loss_of(tuned(source, selection), task(source)) < 0.7 * before
    assert {tensor.dtype for tensor in selection.tensors.values()} == {torch.float32}


def test_a_device_changes_nothing_but_rounding(source_of: SourceOf, device: str) -> None:
    source = source_of("qwen2")
    options = replace(OPTIONS, steps=3)
    selection = select_basis(source, task(source), HALF, options, device=torch.device(device))
    reference = selected(source, options)
    assert [loss for _, loss in selection.losses] == pytest.approx(
        [loss for _, loss in reference.losses], rel=1e-3
    )
    assert {tensor.device.type for tensor in selection.tensors.values()} == {"cpu"}
