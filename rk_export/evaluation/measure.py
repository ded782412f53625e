"""What a run measures beside parity: perplexity on a text and tokens per second."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PretrainedConfig

from rk_export.errors import InputError
from rk_export.evaluation.perplexity import PerplexityResult, perplexity
from rk_export.model.context import context_of
from rk_export.model.families.registry import architecture_of
from rk_export.text import LogitsFn, known_tokens, tokens_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalText:
    """A text whose perplexity a run measures.

    Args:
        path: A UTF-8 text file.
        context: Window length in tokens.
        limit: Only the first tokens; None takes all.
    """

    path: Path
    context: int = 512
    limit: int | None = 5120


@dataclass(frozen=True)
class SpeedTest:
    """A measurement of tokens per second, batch of one.

    Args:
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens decoded after it.
        repeats: Rounds; the median counts.
    """

    prompt_tokens: int = 256
    new_tokens: int = 64
    repeats: int = 3

    def within(self, context: int) -> SpeedTest:
        """Return the test, or a shorter one, with a warning, where it does not fit into a model's context."""
        if self.prompt_tokens + self.new_tokens < context:
            return self
        new_tokens = max(1, min(self.new_tokens, context // 4))
        prompt_tokens = max(1, context - new_tokens - 1)
        logger.warning(
            "speed is measured on a prompt of %d and %d new tokens: the model has a context of %d",
            *(prompt_tokens, new_tokens, context),
        )
        return replace(self, prompt_tokens=prompt_tokens, new_tokens=new_tokens)


def check_text(text: EvalText, tokenizer_folder: Path, longest: int, rows: int) -> None:
    """Refuse, before any work, what perplexity cannot be measured on.

    Args:
        text: The text and its window.
        tokenizer_folder: Holds tokenizer.json.
        longest: Context length of the model.
        rows: Rows of its embedding.

    Raises:
        InputError: If the text cannot be read, one of its tokens has no row, or the window is longer than the model's
            context.
    """
    known_tokens(text.path, tokenizer_folder, rows, limit=text.limit)
    if text.context > longest:
        raise InputError(
            f"a window of {text.context} tokens is longer than the model's context of {longest}",
            where="--context",
            fix=f"give at most {longest}",
        )


def context_length(config: PretrainedConfig, option: str, wanted: int | None = None) -> int:
    """Return the most positions that a decoder takes.

    Args:
        config: The model's configuration.
        option: The option that asks for a decoder, for the message.
        wanted: The context that was asked for, or None.

    Raises:
        InputError: If the model is an encoder, which predicts no next token.
    """
    if architecture_of(config).is_encoder:
        raise encoder_refused(config.model_type, option)
    return context_of(config, wanted)


def encoder_refused(name: str, option: str) -> InputError:
    """Return the message about an encoder where a decoder is asked for.

    Args:
        name: Of the model or its family.
        option: The option that asks for a decoder.
    """
    return InputError(
        f"{name} is an encoder: it predicts no next token, so this cannot be measured",
        where=option,
        fix="leave the option out",
    )


def perplexity_of(logits: LogitsFn, text: EvalText, tokenizer_folder: Path) -> PerplexityResult:
    """Return the perplexity of a text under a model."""
    return perplexity(logits, tokens_of(text.path, tokenizer_folder), context=text.context, limit=text.limit)
