"""Statistics of the dense model against autograd, and predicted against real divergence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranking import rank_correlation
from second_order import loss_increase
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration import sensitivity, statistics_parts
from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.self_text import draw
from rk_export.calibration.sensitivity import dense_statistics
from rk_export.calibration.text_run import TextRun
from rk_export.source.stored import StoredModel

pytestmark = pytest.mark.slow

SourceOf = Callable[..., StoredModel]
CPU = torch.device("cpu")
Q, DOWN = (0, "self_attn.q_proj"), (1, "mlp.down_proj")


def tokens_for(source: StoredModel, sequences: int = 6, length: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, source.config.vocab_size, (sequences, length), generator=generator)


def gather(source: StoredModel, folder: Path, **options: Any) -> DenseStatistics:
    fields = {"diagonal": False, "device": CPU, "dtype": torch.float32, "cache_dir": folder, **options}
    tokens = fields.pop("tokens", tokens_for(source))
    return dense_statistics(source, tokens, **fields)


def matrix(model: PreTrainedModel, source: StoredModel, place: tuple[int, str]) -> nn.Linear:
    module = model.get_submodule(f"{source.architecture.layers}.{place[0]}.{place[1]}")
    assert isinstance(module, nn.Linear)
    return module


def reference(source: StoredModel, path: str, targets: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Return inputs and gradients of the mean loss by the outputs of one module, float64 (tokens, ...)."""
    model = source.load().double()
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        moved = output.detach().requires_grad_()
        seen.extend((args[0].detach(), moved))
        return moved

    model.get_submodule(path).register_forward_hook(note)
    tokens = tokens_for(source)
    logits = model(input_ids=tokens, use_cache=False).logits
    if targets is None:
        logits, targets = logits[:, :-1], tokens[:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    assert seen[1].grad is not None
    return seen[0].flatten(0, -2), seen[1].grad.flatten(0, -2), targets.numel()


def drawn_labels(source: StoredModel, seed: int) -> Tensor:
    tokens = tokens_for(source)
    with torch.no_grad():
        logits = source.load()(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    return draw(logits, torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)).flatten())


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
@pytest.mark.parametrize("labels", ["model", "text"])
def test_statistics_are_those_of_autograd(
    source_of: SourceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, labels: Any
) -> None:
    """Chunks of two sequences against the whole text in float64."""
    monkeypatch.setattr(sensitivity, "GRADIENT_CHUNK", 32)
    source = source_of(family)
    found = gather(source, tmp_path, labels=labels, seed=7)
    targets = drawn_labels(source, 7) if labels == "model" else None
    for role, path in (*source.architecture.attention[:2], *source.architecture.mlp[1:]):
        place = (1, path)
        x, g, predicted = reference(source, f"{source.architecture.layers}.1.{path}", targets)
        assert found.tokens == predicted
        torch.testing.assert_close(found.second[place].double(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.peaks[place].double(), x.abs().amax(0), rtol=1e-3, atol=1e-4)
        assert found.token_peaks[place] == pytest.approx(float(x.abs().amax(1).square().mean()), rel=1e-3)
        expected = g.T @ g
        assert float((found.gradients[place] - expected).norm() / expected.norm()) < 2e-3, role
    _, g, predicted = reference(source, source.architecture.embedding, targets)
    assert found.embedding is not None
    of_tokens = found.embedding * tokens_for(source).numel() / predicted**2
    torch.testing.assert_close(of_tokens.double(), g.square().sum(0), rtol=5e-3, atol=1e-9)


def random_error(linear: nn.Linear, scale: float, seed: int = 0) -> Tensor:
    """Return an error of a weight, relative to the weight's standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return scale * linear.weight.detach().std() * torch.randn(linear.weight.shape, generator=generator)


@torch.no_grad()
def divergence_with(model: PreTrainedModel, tokens: Tensor, linear: nn.Linear, error: Tensor) -> float:
    """Return how far an error of one matrix takes a model from its distribution, in nats per token."""
    dense = model(input_ids=tokens).logits.double().log_softmax(-1)
    kept = linear.weight.clone()
    linear.weight += error
    other = model(input_ids=tokens).logits.double().log_softmax(-1)
    linear.weight.copy_(kept)
    return float((dense.exp() * (dense - other)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
def test_predicted_losses_order_errors_as_they_turn_out(
    source_of: SourceOf, tmp_path: Path, family: str
) -> None:
    """Three errors of every matrix, from a hundredth to a twentieth of its weights."""
    source = source_of(family)
    tokens = tokens_for(source, 32, 32)
    found = gather(source, tmp_path, tokens=tokens)
    model = source.load()
    predicted, measured = [], []
    for seed, scale in enumerate((0.01, 0.025, 0.05)):
        for place in found.gradients:
            linear = matrix(model, source, place)
            error = random_error(linear, scale, seed)
            predicted.append(loss_increase(found.gradients[place], error, found.second[place], found.tokens))
            measured.append(divergence_with(model, tokens, linear, error))
    assert len(predicted) >= 30
    assert rank_correlation(predicted, measured) > 0.95


@pytest.mark.parametrize("place", [Q, (0, "self_attn.o_proj"), (1, "mlp.gate_proj"), DOWN])
def test_predicted_loss_is_the_real_divergence(
    source_of: SourceOf, tmp_path: Path, place: tuple[int, str]
) -> None:
    """A small random error of one matrix: within 30 % of the divergence from the dense model's distribution."""
    source = source_of("llama")
    tokens = tokens_for(source, 64, 32)
    found = gather(source, tmp_path, tokens=tokens)
    assert found.tokens == tokens.numel()
    model = source.load()
    error = random_error(matrix(model, source, place), 0.01)
    divergence = divergence_with(model, tokens, matrix(model, source, place), error)
    predicted = loss_increase(found.gradients[place], error, found.second[place], found.tokens)
    assert predicted == pytest.approx(divergence, rel=0.3)
    diagonal = loss_increase(found.gradients[place].diagonal(), error, found.second[place], found.tokens)
    assert diagonal == pytest.approx(divergence, rel=0.3)  # a random error has no direction of its own


def test_diagonals(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    whole = gather(source, tmp_path)
    diagonals = gather(source, tmp_path, diagonal=True)
    for place, gradient in whole.gradients.items():
        torch.testing.assert_close(diagonals.gradients[place], gradient.diagonal())


def test_gradients_of_a_part_of_the_text(source_of: SourceOf, tmp_path: Path) -> None:
    """Inputs are seen on all of it."""
    source = source_of("llama")
    whole, part = gather(source, tmp_path), gather(source, tmp_path, gradient_tokens=40)
    first = gather(source, tmp_path, tokens=tokens_for(source)[:2])
    assert part.tokens == first.tokens == 32
    torch.testing.assert_close(part.second[DOWN], whole.second[DOWN])
    torch.testing.assert_close(part.peaks[DOWN], whole.peaks[DOWN])
    torch.testing.assert_close(part.gradients[DOWN], first.gradients[DOWN])


def test_experts_have_their_own(source_of: SourceOf, tmp_path: Path) -> None:
    found = gather(source_of("mixtral"), tmp_path)
    gate, up, down = ((1, f"mlp.experts.0.{name}_proj") for name in ("gate", "up", "down"))
    assert found.second[gate] is found.second[up]
    assert found.second[gate].shape != found.second[down].shape
    assert found.gradients[down].shape == (64, 64)


def test_statistics_are_read_again(
    source_of: SourceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("llama")
    found = gather(source, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TextRun, "forward", lambda *args: pytest.fail("computed again"))
        again = gather(source, tmp_path)
        for changes in ({"seed": 1}, {"labels": "text"}, {"diagonal": True}, {"gradient_tokens": 16}):
            with pytest.raises(pytest.fail.Exception):
                gather(source, tmp_path, **changes)
        with pytest.raises(pytest.fail.Exception):
            gather(source_of("llama", rms_norm_eps=1e-3), tmp_path)
    assert again.tokens == found.tokens
    assert again.token_peaks == found.token_peaks
    for kind in ("second", "peaks", "gradients"):
        before, after = getattr(found, kind), getattr(again, kind)
        assert set(before) == set(after)
        assert all(torch.equal(before[place], after[place]) for place in before)
    assert again.second[Q] is again.second[0, "self_attn.v_proj"]


def test_large_statistics_are_not_kept(
    source_of: SourceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(statistics_parts, "CACHE_LIMIT", 1000)
    with caplog.at_level(logging.INFO):
        gather(source_of("llama"), tmp_path)
    assert "not cached" in caplog.text
    assert not list(tmp_path.rglob("*.safetensors"))
