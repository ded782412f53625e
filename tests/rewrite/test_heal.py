"""Recovery: the loss falls, only what was asked for changes, runs go on exactly, and the result still exports."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import INT4, OnnxModel, SourceOf, compress, floats, logits, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.errors import InputError
from rk_export.methods.heal.distil import HealResult, heal
from rk_export.methods.heal.options import HealOptions
from rk_export.methods.heal.shared_products import shared_products
from rk_export.methods.heal.trainable import trainable
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.options.recipe import Recipe
from rk_export.options.target import Target
from rk_export.rewrite.apply import Rewritten
from rk_export.rewrite.checkpoint import load_pretrained, save_pretrained
from rk_export.source.stored import StoredModel
from rk_export.training.distillation import Head, backward_divergence, dense_states, last_hidden
from rk_export.training.loop import batch_rows

RANK_24 = RankRule("rank", 24)
IDENTITY = floats(("qk",), rank=RANK_24, form="identity")
RANKS = floats(("qk",), rank=RANK_24)
BALANCED = floats(("qk",), rank=RANK_24, gauge="balanced")
PER_HEAD = floats(("qk",), qk="per-head", rank=RankRule("rank", 8))
INT4_RANKS = floats(("qk",), rank=RANK_24, quant=INT4, table=QuantSpec(8, 16))
OPTIONS = HealOptions(steps=12, batch_tokens=64, learning_rate=0.01, precision="fp32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    monkeypatch.setattr("rk_export.tensor_cache.CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def healed(
    source: StoredModel, compression: Recipe, options: HealOptions = OPTIONS, **arguments: Any
) -> tuple[Rewritten, HealResult]:
    rewritten = compress(source, compression)
    return rewritten, heal(rewritten, source, tokens(source, 8, 16), options, **arguments)


def divergence(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of two models per token, in float64."""
    wanted, actual = (torch.log_softmax(logits(model, ids).double(), -1) for model in (teacher, student))
    return float((wanted.exp() * (wanted - actual)).sum(-1).mean())


def snapshot(rewritten: Rewritten) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in rewritten.model.state_dict().items()}


@pytest.mark.parametrize("compression", [RANKS, IDENTITY, INT4_RANKS], ids=["factors", "identity", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite", "gpt2", "opt"])
def test_the_divergence_falls(source_of: SourceOf, family: str, compression: Recipe) -> None:
    source = source_of(family)
    teacher, ids = source.load(), tokens(source, 8, 16)
    student = compress(source, compression).model
    before = divergence(student, teacher, ids)
    batch = ids[batch_rows(0, OPTIONS.batch_tokens // ids.shape[1], len(ids), OPTIONS.seed)]
    rewritten, result = healed(source, compression)
    assert result.losses[0] == (1, pytest.approx(divergence(student, teacher, batch), rel=1e-3))
    assert divergence(rewritten.model, teacher, ids) < 0.7 * before
    assert [step for step, _ in result.losses] == list(range(1, 13))
    assert result.tokens == 12 * 64


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "opt"])
def test_the_loss_and_its_gradient_are_those_of_whole_logits(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    student, teacher = compress(source, RANKS).model, source.load()
    ids, temperature = tokens(source, 2, 16), 2.0
    parameter = next(
        tensor for name, tensor in student.named_parameters() if name.endswith("qk_factors.down.weight")
    )
    parameter.requires_grad_(True)
    heads = [Head(model, source.description, ids.device, torch.float32) for model in (student, teacher)]
    states = last_hidden(teacher, ids).detach().flatten(0, 1)
    loss = backward_divergence(
        last_hidden(student, ids).flatten(0, 1),
        heads[0],
        states,
        heads[1],
        temperature=temperature,
        share=0.5,
    )
    expected = torch.log_softmax(teacher(ids).logits.detach() / temperature, -1)
    actual = torch.log_softmax(student(ids).logits / temperature, -1)
    whole = 4 * (expected.exp() * (expected - actual)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(0.5 * whole, parameter)
    assert parameter.grad is not None
    assert loss == pytest.approx(float(whole.detach()), rel=1e-4)
    assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("compression", [RANKS, PER_HEAD, IDENTITY], ids=["joint", "per-head", "identity"])
def test_shared_products_change_neither_outputs_nor_gradients(
    source_of: SourceOf, compression: Recipe
) -> None:
    source = source_of("qwen2")
    rewritten, ids = compress(source, compression), tokens(source)
    with trainable(rewritten, ("factors", "biases")) as tensors:
        apart = rewritten.model(ids).logits
        apart_gradients = torch.autograd.grad(apart.square().sum(), tensors.values())
        downs = Calls(rewritten.model, "down")
        with shared_products(rewritten.model):
            together = rewritten.model(ids).logits
            gradients = torch.autograd.grad(together.square().sum(), tensors.values())
    assert downs.count == len(downs.modules)
    assert torch.allclose(together, apart, rtol=1e-5, atol=1e-5)
    for first, second in zip(apart_gradients, gradients, strict=True):
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-5 * float(first.abs().max()))
    assert torch.equal(rewritten.model(ids).logits, apart)


class Calls:
    """Counts the calls of the factors of one name."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.count = 0
        paths = [
            path for path, _ in model.named_modules() if "_factors" in path and path.endswith(f".{name}")
        ]
        self.modules = [model.get_submodule(path) for path in paths]
        for module in self.modules:
            module.register_forward_hook(self._called)

    def _called(self, *_: object) -> None:
        self.count += 1


KINDS = {
    "factors": (RANKS, ("qk_factors.down.weight", "qk_factors.ups.q.weight", "qk_factors.ups.k.weight")),
    "norms": (RANKS, ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")),
    "biases": (RANKS, ("qk_factors.ups.q.bias", "qk_factors.ups.k.bias", "v_proj.bias")),
    "scales": (INT4_RANKS, ("qk_factors.down.scales", "o_proj.scales", "down_proj.scales")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_was_asked_for_changes(source_of: SourceOf, kind: str) -> None:
    compression, endings = KINDS[kind]
    source = source_of("qwen2")
    rewritten = compress(source, compression)
    before = snapshot(rewritten)
    heal(rewritten, source, tokens(source, 8, 16), replace(OPTIONS, what=(kind,)))
    after = rewritten.model.state_dict()
    assert list(after) == list(before)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert all(any(name.endswith(ending) for name in changed) for ending in endings)
    leaf = {"factors": "weight", "norms": "weight", "biases": "bias", "scales": "scales"}[kind]
    assert all(name.endswith(leaf) for name in changed)
    assert not any("embed_tokens" in name or "lm_head" in name for name in changed)
    if kind == "factors":
        assert all("qk_factors" in name for name in changed)


def test_everything_is_frozen_afterwards_and_keeps_its_type(source_of: SourceOf) -> None:
    half = replace(INT4_RANKS, target=Target("portable", accuracy_level=0))
    source = source_of("qwen2")
    types = {name: tensor.dtype for name, tensor in compress(source, half).model.state_dict().items()}
    rewritten, _ = healed(source, half, replace(OPTIONS, steps=1))
    assert {name: tensor.dtype for name, tensor in rewritten.model.state_dict().items()} == types
    assert torch.float16 in types.values()
    tensors = [*rewritten.model.parameters(), *rewritten.model.buffers()]
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in tensors)


def test_an_error_inside_leaves_the_model_frozen(source_of: SourceOf) -> None:
    rewritten = compress(source_of("llama"), INT4_RANKS)

    def interrupted() -> None:
        with trainable(rewritten, ("scales", "norms")) as tensors:
            assert all(tensor.requires_grad for tensor in tensors.values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(tensor.requires_grad for tensor in rewritten.model.state_dict(keep_vars=True).values())


def test_a_run_that_goes_on_equals_one_that_never_stopped(
    source_of: SourceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps of one schedule: stopped after the second of four, and continued in a new model."""
    options = replace(OPTIONS, steps=4)
    source, state = source_of("llama"), tmp_path / "deep" / "heal.pt"
    whole, result = healed(source, INT4_RANKS, options)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            healed(source, INT4_RANKS, options, state=state)
    with caplog.at_level(logging.INFO, "rk_export.training.loop"):
        resumed, other = healed(source, INT4_RANKS, options, state=state)
    assert "goes on after step 2 of 4" in caplog.text
    assert other.losses == result.losses
    expected, actual = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    assert [path.name for path in state.parent.iterdir()] == ["heal.pt"]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Write the state after every step, and interrupt in the middle of the next one after `steps`."""
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
    source, state = source_of("llama"), tmp_path / "heal.pt"
    first, result = healed(source, RANKS, replace(OPTIONS, steps=2), state=state)
    stop_after(monkeypatch, 0)  # any step would interrupt
    again, repeated = healed(source, RANKS, replace(OPTIONS, steps=2), state=state)
    assert repeated.losses == result.losses
    assert repeated.tokens == result.tokens
    assert all(map(torch.equal, again.model.state_dict().values(), first.model.state_dict().values()))


@pytest.mark.parametrize("change", ["options", "tokens", "plan", "weights"])
def test_the_state_of_another_run_is_refused(source_of: SourceOf, tmp_path: Path, change: str) -> None:
    source, state, options = source_of("llama"), tmp_path / "heal.pt", replace(OPTIONS, steps=2)
    healed(source, RANKS, options, state=state)
    written = state.read_bytes()
    rewritten = compress(source, BALANCED if change == "plan" else RANKS)
    if change == "weights":
        rewritten.model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] += 1
    ids = tokens(source, 8, 16, seed=int(change == "tokens"))
    with pytest.raises(InputError, match="state of another recovery"):
        heal(rewritten, source, ids, replace(options, seed=int(change == "options")), state=state)
    assert state.read_bytes() == written
    assert not any(parameter.requires_grad for parameter in rewritten.model.parameters())


@pytest.mark.parametrize("content", [b"", b"no state", None])
def test_a_damaged_state_is_refused(source_of: SourceOf, tmp_path: Path, content: bytes | None) -> None:
    source, state, options = source_of("llama"), tmp_path / "heal.pt", replace(OPTIONS, steps=1)
    if content is None:
        healed(source, RANKS, options, state=state)
        content = state.read_bytes()[:-100]
    state.write_bytes(content)
    with pytest.raises(InputError, match="is no state of a recovery"):
        healed(source, RANKS, options, state=state)


@pytest.mark.whole
@pytest.mark.parametrize("compression", [RANKS, INT4_RANKS], ids=["factors", "int4"])
def test_a_healed_model_exports_and_is_saved(
    source_of: SourceOf, tmp_path: Path, compression: Recipe
) -> None:
    source = source_of("qwen2")
    rewritten, _ = healed(source, compression)
    ids = tokens(source)
    expected = logits(rewritten.model, ids)
    actual, _ = OnnxModel(rewritten, tmp_path).run(ids)
    assert float((actual - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    save_pretrained(rewritten, tmp_path / "saved", tokenizer_from=source.folder)
    assert torch.equal(logits(load_pretrained(tmp_path / "saved").model, ids), expected)


def test_bf16_products_heal_too(source_of: SourceOf) -> None:
    source = source_of("llama")
    teacher, ids = source.load(), tokens(source, 8, 16)
    before = divergence(compress(source, RANKS).model, teacher, ids)
    rewritten, _ = healed(source, RANKS, replace(OPTIONS, precision="bf16"))
    assert divergence(rewritten.model, teacher, ids) < 0.7 * before
    assert {parameter.dtype for parameter in rewritten.model.parameters()} == {torch.float32}


def test_what_the_dense_model_says_is_computed_once(
    source_of: SourceOf, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("gemma2")
    ids = tokens(source, 4, 16)
    first = dense_states(source, ids, ids.device, torch.float32)
    assert torch.allclose(first, last_hidden(source.load(), ids), rtol=1e-5, atol=1e-5)
    assert len(list(cache.rglob("*.safetensors"))) == 1
    assert not torch.equal(dense_states(source, ids.flip(0), ids.device, torch.float32), first)
    monkeypatch.setattr(type(source), "load_layer", None)
    assert torch.equal(dense_states(source, ids, ids.device, torch.float32), first)


def test_every_sequence_is_drawn_once_before_any_again() -> None:
    drawn = [row for step in range(10) for row in batch_rows(step, 3, 5, seed=7)]
    assert all(sorted(drawn[begin : begin + 5]) == list(range(5)) for begin in range(0, 30, 5))
    assert drawn[:5] != drawn[5:10] or drawn[5:10] != drawn[10:15]


def test_the_rate_rises_and_falls() -> None:
    options = HealOptions(steps=100, warmup=0.1)
    rates = [options.rate(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.2
    assert rates[10] == 1
    assert 0 < rates[-1] < 0.01
    assert HealOptions(steps=1, warmup=0).rate(0) == 1


def test_the_finding_says_what_was_done(source_of: SourceOf) -> None:
    source = source_of("llama")
    rewritten, result = healed(source, RANKS, replace(OPTIONS, steps=2, what=("factors",)))
    assert result.finding.target == "heal"
    details = result.finding.details
    assert details is not None
    assert details["steps"] == 2
    linears = [module for module in rewritten.model.modules() if isinstance(module, nn.Linear)]
    assert 0 < details["trained"] < sum(linear.weight.numel() for linear in linears)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"steps": 0}, "heal.steps"),
        ({"batch_tokens": 1}, "heal.batch_tokens"),
        ({"learning_rate": 0.0}, "heal.learning_rate"),
        ({"learning_rate": float("nan")}, "heal.learning_rate"),
        ({"temperature": -1.0}, "heal.temperature"),
        ({"warmup": 1.0}, "heal.warmup"),
        ({"what": ()}, "heal.what"),
        ({"what": ("weights",)}, "heal.what"),
        ({"precision": "fp16"}, "heal.precision"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(OPTIONS, **changes)
    assert caught.value.where == where
    assert caught.value.fix


def test_what_cannot_be_healed_is_refused(source_of: SourceOf) -> None:
    source = source_of("llama")
    with pytest.raises(InputError, match="has none of them"):
        healed(source, RANKS, replace(OPTIONS, what=("scales",)))
    bert = source_of("bert")
    with pytest.raises(InputError, match="an encoder"):
        heal(compress(bert, floats()), bert, tokens(bert), OPTIONS)


@pytest.mark.parametrize(
    "ids", [torch.zeros(4), torch.zeros(1, 1), torch.zeros(1, 999), torch.full((1, 4), 999)]
)
def test_tokens_that_do_not_fit_are_refused(source_of: SourceOf, ids: Tensor) -> None:
    source = source_of("llama")
    with pytest.raises(InputError) as caught:
        heal(compress(source, RANKS), source, ids.long(), OPTIONS)
    assert caught.value.where == "tokens"


def test_a_loss_that_is_not_finite_ends_the_run(source_of: SourceOf) -> None:
    source = source_of("llama")
    with pytest.raises(InputError, match="smaller learning rate"):
        healed(source, RANKS, replace(OPTIONS, steps=30, learning_rate=1e30))
