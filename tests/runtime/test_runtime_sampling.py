"""The distribution that tokens are drawn from, exactly, against the processors of Hugging Face ``generate``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from rk_export.errors import InputError
from rk_export.runtime import GenerationOptions
from rk_export.runtime.sampling import (
    Sampler,
    above_share,
    draw,
    kth_highest,
    penalize,
    ranked_before,
    token_weights,
)

ROUNDED = 1e-6  # relative; below that, sums of float32 do not tell on which side of top-p a token lies


def reference(logits: np.ndarray, options: GenerationOptions) -> np.ndarray:
    """Return the probability of every token by transformers' processors, in float64."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_k:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        steps.append(MinPLogitsWarper(options.min_p))
    scores = steps(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits.astype(np.float64))[None])
    return np.asarray(scores.softmax(-1)[0].numpy())


def distribution(logits: np.ndarray, options: GenerationOptions) -> tuple[np.ndarray, bool]:
    """Return the probability with which each token is drawn, and whether rounding could move the border of top-p.

    A draw is repeated among the tokens before the one drawn until it hits the nucleus. So tokens of the nucleus
    keep the ratios of their weights, and others have probability 0.
    """
    weights = token_weights(logits, options, np.empty_like(logits))
    kept = above_share(weights, options.min_p, np.empty_like(logits)).astype(np.float64)
    total, blurred = float(weights.sum()), False
    if options.top_p < 1:
        masses = [
            float(ranked_before(weights, token, np.empty_like(logits)).sum()) for token in range(len(weights))
        ]
        kept *= np.array(masses) < options.top_p * total
        blurred = bool(np.any(np.abs(np.array(masses) - options.top_p * total) <= ROUNDED * total))
    return kept / kept.sum(), blurred


def assert_same(logits: np.ndarray, mine: np.ndarray, wanted: np.ndarray) -> None:
    """Compare token by token; among equal logits the kept ones are compared in number, for torch sorts them freely."""
    mine, wanted = (values[np.lexsort((values, logits))] for values in (mine, wanted))
    np.testing.assert_allclose(mine, wanted, rtol=3e-5, atol=1e-30)


logit = st.one_of(
    st.floats(-30, 30).map(lambda value: round(value, 2)),  # no two so close that float32 weights tie
    st.integers(-2, 2).map(float),  # ties
    st.sampled_from([-np.inf, -3e4, 0.0, 3e4]),
)


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(logit, min_size=1, max_size=40),
    finite=st.integers(-5, 5).map(float),
    temperature=st.one_of(st.floats(0.2, 3), st.sampled_from([0.01, 1.0, 50.0])),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.floats(0.01, 0.99), st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.0])),
    min_p=st.one_of(st.floats(0, 0.9), st.sampled_from([0.0, 0.0, 1.0])),
)
def test_probabilities_are_those_of_transformers(
    values: list[float], finite: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.array([*values, finite], np.float32)
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    mine, blurred = distribution(logits, options)
    wanted = reference(logits, options)
    ratios = wanted / wanted.max()
    blurred |= bool(np.any(np.abs(ratios - min_p) <= ROUNDED)) and 0 < min_p < 1
    if not blurred:
        assert_same(logits, mine, wanted)


@pytest.mark.parametrize("kind", ["equal", "one-hot", "two levels", "random"])
def test_adversarial_logits(kind: str) -> None:
    size = 512
    logits = {
        "equal": np.zeros(size),
        "one-hot": np.where(np.arange(size) == 100, 50.0, -np.inf),
        "two levels": np.where(np.arange(size) % 3 == 0, 1.0, 0.0),
        "random": np.random.default_rng(0).standard_normal(size) * 4,
    }[kind].astype(np.float32)
    for options in (
        GenerationOptions(temperature=0.7),
        GenerationOptions(temperature=0.7, top_k=7),
        GenerationOptions(temperature=0.7, top_p=0.377),
        GenerationOptions(temperature=0.7, min_p=0.3),
        GenerationOptions(temperature=1.3, top_k=100, top_p=0.377, min_p=0.01),
    ):
        mine, blurred = distribution(logits, options)
        assert not blurred
        assert_same(logits, mine, reference(logits, options))


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(temperature=1.2, top_p=0.15, seed=1),  # most first draws miss the nucleus
        GenerationOptions(temperature=1.2, top_p=0.6, min_p=0.2, seed=2),
        GenerationOptions(temperature=0.9, top_k=9, top_p=0.8, seed=3),
        GenerationOptions(temperature=0.9, seed=4),
    ],
)
def test_draws_follow_the_probabilities(options: GenerationOptions) -> None:
    logits = np.random.default_rng(3).standard_normal(1100).astype(np.float32) * 2
    wanted = reference(logits, options)
    sampler, draws = Sampler(options, []), 4000
    drawn = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=len(logits))
    assert not drawn[wanted == 0].any()
    groups = np.arange(len(logits)) % 8  # of some hundred draws each
    counts = np.bincount(groups, weights=drawn, minlength=8)
    expected = np.bincount(groups, weights=wanted, minlength=8) * draws
    assert (((counts - expected) ** 2)[expected > 0] / expected[expected > 0]).sum() < 30  # chi-squared of 7


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 2000), quantile=st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_distribution(seed: int, size: int, quantile: float) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.random(size) * (rng.random(size) < 0.5)).astype(np.float32)
    weights[rng.integers(size)] = 1.0
    token = draw(weights, quantile)
    cumulative = weights.cumsum(dtype=np.float64)
    slack = 1e-6 * cumulative[-1]
    assert weights[token] > 0
    assert (
        cumulative[token] - weights[token] - slack <= quantile * cumulative[-1] <= cumulative[token] + slack
    )


def test_the_last_quantile_never_falls_on_a_token_without_weight() -> None:
    weights = np.zeros(1300, np.float32)
    weights[:700] = np.float32(0.1)
    assert draw(weights, float(np.nextafter(1, 0))) == 699
    assert draw(weights, 0.0) == 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 6000),
    levels=st.sampled_from([0, 1, 3, 50]),
    spread=st.booleans(),
)
def test_kth_highest_equals_a_sort(seed: int, k: int, levels: int, spread: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(6000) * 4
    if levels:
        scores = np.round(scores) % levels
    if not spread:
        scores = np.sort(scores)
    assert kth_highest(scores.astype(np.float32), k) == np.sort(scores.astype(np.float32))[-k]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e30, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits = np.array([1.0, 3.0, 2.0, -np.inf], np.float32)
    weights = token_weights(logits, GenerationOptions(temperature=temperature), np.empty_like(logits))
    np.testing.assert_array_equal(weights, [0, 1, 0, 0] if temperature < 1 else [1, 1, 1, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    sampler = Sampler(GenerationOptions(temperature=temperature), [])
    with pytest.raises(InputError, match=f"the highest logit is {bad}"):
        sampler.choose(np.array([1.0, bad, 2.0], np.float32))
    with pytest.raises(InputError, match="the highest logit is -inf"):
        sampler.choose(np.full(5, -np.inf, np.float32))


def test_seeds_repeat_and_rows_differ() -> None:
    logits = np.zeros(1000, np.float32)
    options = GenerationOptions(temperature=1.0, top_p=0.9, seed=5)

    def tokens(row: int) -> list[int]:
        sampler = Sampler(options, [], row)
        return [sampler.choose(logits) for _ in range(10)]

    assert tokens(0) == tokens(0) != tokens(1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), penalty=st.floats(0.5, 3), prompt=st.lists(st.integers(0, 31), min_size=1)
)
def test_penalty_is_that_of_transformers(seed: int, penalty: float, prompt: list[int]) -> None:
    logits = np.random.default_rng(seed).standard_normal(32).astype(np.float32)
    before = logits.copy()
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt]), torch.from_numpy(logits)[None]
    )[0]
    mine = penalize(logits, np.unique(prompt), penalty, np.empty_like(logits))
    np.testing.assert_allclose(mine, wanted.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(logits, before, "the logits given are left alone")


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e40, 1e300])
@pytest.mark.filterwarnings("error")
def test_a_penalty_of_any_size_leaves_finite_scores(penalty: float) -> None:
    logits = np.array([0.0, 3.0, -2.0, 1.0, -np.inf], np.float32)
    mine = penalize(logits, np.array([0, 1, 2, 4]), penalty, np.empty_like(logits))
    assert np.isfinite(mine[:4]).all()
    assert mine[0] == 0, "a score of nothing stays"
    assert (mine[3], mine[4]) == (1, -np.inf), "what is unseen, and what can never be drawn, stays"
    assert (mine[1] > 3 and mine[2] > -2) if penalty < 1 else (mine[1] < 3 and mine[2] < -2)
    assert Sampler(GenerationOptions(repetition_penalty=penalty), [1]).choose(logits) == (
        1 if penalty < 1 else 3
    )


@pytest.mark.parametrize("prompt", [[], [1]])
def test_penalty_covers_prompt_and_new_tokens(prompt: list[int]) -> None:
    sampler = Sampler(GenerationOptions(repetition_penalty=4.0), prompt)
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    chosen = [sampler.choose(logits) for _ in range(4)]
    assert chosen == ([1, 2, 0, 1] if not prompt else [2, 0, 1, 1])


def test_greedy_takes_the_likeliest() -> None:
    assert Sampler(GenerationOptions(), []).choose(np.array([0.1, 0.9, 0.3], np.float32)) == 1
