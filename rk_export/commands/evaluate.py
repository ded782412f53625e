"""The perplexity of one model."""

from __future__ import annotations

from pathlib import Path

from rk_export.evaluation.measure import EvalText, check_text, perplexity_of
from rk_export.evaluation.models import open_evaluated
from rk_export.evaluation.perplexity import PerplexityResult
from rk_export.runtime.providers import Provider


def evaluate(
    model: str | Path,
    text: EvalText,
    *,
    base: str | Path | None = None,
    provider: Provider = "auto",
    threads: int | None = None,
) -> PerplexityResult:
    """Return the perplexity of a dense model or checkpoint in PyTorch, or of a bundle in ONNX Runtime.

    Args:
        model: As in `rk_export.evaluation.models.open_evaluated`.
        text: What to measure on.
        base: As in `compress`.
        provider: Execution provider, of a bundle.
        threads: Threads of ONNX Runtime, of a bundle.

    Raises:
        InputError: If the model or the text cannot be used.
    """
    opened = open_evaluated(model, "--text", base=base, provider=provider, threads=threads)
    check_text(text, opened.folder, opened.max_length, opened.rows)
    return perplexity_of(opened.load(), text, opened.folder)
