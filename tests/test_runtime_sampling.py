"""Token choice against a small reference that follows the definitions literally."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rk_export.runtime import GenerationOptions
from rk_export.runtime.sampling import Sampler, candidates, penalize


def reference(logits: np.ndarray, options: GenerationOptions) -> np.ndarray:
    """Return the probability of every token: temperature, then top-k, then top-p on what is left."""
    scores = logits / options.temperature
    if options.top_k:
        scores = np.where(
            scores < np.sort(scores)[::-1][min(options.top_k, len(scores)) - 1], -np.inf, scores
        )
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    kept, mass = set(), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if mass >= options.top_p:
            break
        kept.add(int(token))
        mass += probabilities[token]
    masked = np.where([token in kept for token in range(len(scores))], probabilities, 0)
    return np.asarray(masked / masked.sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 0.99),
)
def test_candidates_equal_the_reference(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).standard_normal(32).astype(np.float32) * 3
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, probabilities = candidates(logits, options)
    dense = np.zeros(32)
    dense[tokens] = probabilities
    np.testing.assert_allclose(dense, reference(logits.astype(np.float64), options), atol=1e-12)


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(GenerationOptions(temperature=1.0, top_k=3, seed=0), [])
    drawn = np.bincount([sampler.choose(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_penalty_lowers_positive_and_negative_scores() -> None:
    logits = np.array([2.0, -2.0, 2.0, -2.0], np.float32)
    np.testing.assert_allclose(penalize(logits, {0, 1}, 2.0), [1, -4, 2, -2])
    np.testing.assert_array_equal(logits, [2, -2, 2, -2], "the logits given are left alone")


@pytest.mark.parametrize("prompt", [[], [1]])
def test_penalty_covers_prompt_and_new_tokens(prompt: list[int]) -> None:
    sampler = Sampler(GenerationOptions(repetition_penalty=4.0), prompt)
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    chosen = [sampler.choose(logits) for _ in range(4)]
    assert chosen == ([1, 2, 0, 1] if not prompt else [2, 0, 1, 1])


def test_greedy_takes_the_likeliest() -> None:
    assert Sampler(GenerationOptions(), []).choose(np.array([0.1, 0.9, 0.3], np.float32)) == 1
