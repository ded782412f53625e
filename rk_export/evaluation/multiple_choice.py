"""Accuracy of a causal language model on tasks: the choice it finds likeliest is its answer.

Two answers are counted: the choice of the highest log likelihood (``acc``), and of the highest per byte of its text
(``acc_norm``), which does not favour short choices.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rk_export.evaluation.log_likelihood import Likelihood, PairEncoder, log_likelihoods
from rk_export.evaluation.tasks import Item, Task
from rk_export.text import LogitsFn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task; each error is one standard error of the mean over the items, NaN for a single item.

    Args:
        task: Name of the task.
        items: Items asked.
        acc: Share of right answers.
        acc_error: Its standard error.
        acc_norm: Share of right answers by log likelihood per byte; None where the last word is asked for.
        acc_norm_error: Its standard error.
        perplexity: Of the last word, exp of its mean negative log likelihood; None with several choices.
        perplexity_error: Its standard error, to first order.
        truncated: Continuations whose context lost its beginning because the model's is shorter.
        right: For each item whether the answer was right, for paired comparisons.
        right_norm: The same by log likelihood per byte; empty where the last word is asked for.
    """

    task: str
    items: int
    acc: float
    acc_error: float
    acc_norm: float | None
    acc_norm_error: float | None
    perplexity: float | None
    perplexity_error: float | None
    truncated: int
    right: tuple[bool, ...] = field(repr=False)
    right_norm: tuple[bool, ...] = field(repr=False)


def score_task(
    logits_fn: LogitsFn,
    task: Task,
    encoder: PairEncoder,
    *,
    max_length: int,
    rotary_switch: int | None = None,
) -> TaskResult:
    """Ask a model the items of a task.

    Args:
        logits_fn: As in `log_likelihoods`.
        task: What to ask.
        encoder: The model's tokenizer.
        max_length: Most tokens that the model takes.
        rotary_switch: As in `log_likelihoods`.

    Raises:
        InputError: As `log_likelihoods`, or a choice has no tokens of its own.
    """
    pairs = [encoder.pair(*pair) for item in task.items for pair in item.pairs()]
    found = log_likelihoods(
        logits_fn, pairs, max_length=max_length, rotary_switch=rotary_switch, title=task.name
    )
    scores = iter(found)
    by_item = [[next(scores) for _ in item.choices] for item in task.items]
    truncated = sum(len(one.context) + len(one.tokens) - 1 > max_length for one in pairs)
    if truncated:
        logger.warning(
            "%s: %d contexts lost their beginning, over %d tokens", task.name, truncated, max_length
        )
    if task.asks_for_last_word:
        return _last_word_result(task, [score for (score,) in by_item], truncated)
    return _choice_result(task, by_item, truncated)


def _choice_result(task: Task, scores: list[list[Likelihood]], truncated: int) -> TaskResult:
    right, right_norm = [], []
    for item, likelihoods in zip(task.items, scores, strict=True):
        values = np.array([one.log_likelihood for one in likelihoods])
        right.append(int(values.argmax()) == item.gold)
        right_norm.append(int((values / _byte_lengths(item)).argmax()) == item.gold)
    return TaskResult(
        task.name,
        len(task.items),
        *mean_and_error(right),
        *mean_and_error(right_norm),
        perplexity=None,
        perplexity_error=None,
        truncated=truncated,
        right=tuple(right),
        right_norm=tuple(right_norm),
    )


def _byte_lengths(item: Item) -> np.ndarray:
    return np.array([len(choice.encode()) for choice in item.choices])


def _last_word_result(task: Task, scores: list[Likelihood], truncated: int) -> TaskResult:
    right = [score.greedy for score in scores]
    loss, error = mean_and_error([-score.log_likelihood for score in scores])
    perplexity = math.exp(loss) if loss < 700 else math.inf  # beyond that a float overflows
    return TaskResult(
        task.name,
        len(task.items),
        *mean_and_error(right),
        acc_norm=None,
        acc_norm_error=None,
        perplexity=perplexity,
        perplexity_error=perplexity * error,
        truncated=truncated,
        right=tuple(right),
        right_norm=(),
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, NaN for a single value."""
    if len(values) == 1:
        return float(values[0]), math.nan
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) / math.sqrt(array.size)
