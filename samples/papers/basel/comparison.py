"""The rows of the comparison: dense, truncated, and selected for a task, each judged on every text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import harness
from measure.harness import Measure, Row

from rk_export import (
    BaselOptions,
    CalibrationOptions,
    EvalText,
    Factorize,
    Recipe,
    Run,
    TextFile,
    open_source,
    perplexity_of,
    rewrite_model,
    torch_logits,
)
from rk_export.calibration.target_text import target_tokens
from rk_export.device import matmul_dtype, matmuls_in
from rk_export.methods.basel.selection import select_basis
from rk_export.source.replaced import Replaced

BASEL = "Basel, "
KEPT = (0.7, 0.5)
# What directions are judged by: the paper's magnitude and the alternatives, by target; last, magnitude in bases that
# are whitened by the task's inputs.
WHITENED = "whitened"
IMPORTANCES = {
    "arithmetic": ("magnitude", "gradient", "second-order", WHITENED),
    "code": ("magnitude", "gradient", WHITENED),
}
SINGLE = ("q", "k", "v", "o", "gate", "up", "down")
SEQUENCE = 512
TOKENS, CONTEXT = 5120, 512
WHITENED_RATE = 3e-3
CALIBRATION = 16384
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Comparison:
    """Where and how everything is measured.

    Args:
        model: HF folder of the dense model.
        work: Folder for the states of trainings.
        device: Where everything runs.
        steps: Steps of one basis selection.
        rate: Its learning rate.
        texts: Held-out text by name.
        training: The targets' texts to train on.
    """

    model: Path
    work: Path
    device: torch.device
    steps: int
    rate: float
    texts: Mapping[str, Path]
    training: Mapping[str, Path]

    def rows(self) -> Iterator[tuple[str, Measure]]:
        """Yield every row, in the order in which they are measured."""
        yield "dense", self._row("dense", None, 1.0, self._dense)
        for keep in KEPT:
            yield f"svd-{keep}", self._row("SVD", None, keep, partial(self._svd, keep, None))
        for keep in KEPT:
            for target in self.training:
                measure = partial(self._svd, keep, target)
                yield f"svdllm-{target}-{keep}", self._row("SVD-LLM, target", target, keep, measure)
            for target, importances in IMPORTANCES.items():
                for importance in importances:
                    measure = partial(self._basel, target, keep, importance)
                    series = f"{BASEL}{importance}"
                    yield f"basel-{target}-{keep}-{importance}", self._row(series, target, keep, measure)

    def _row(self, series: str, target: str | None, asked: float, measure: Measure) -> Measure:
        """Return a measurement that also says the method, the task whose text it saw, and the share asked for."""

        def with_facts() -> Row:
            where = harness.machine(self.device.type)
            return {"series": series, "target": target, "asked": asked, **measure(), "machine": where}

        return with_facts

    def _dense(self) -> Row:
        return {"kept": 1.0, "perplexity": self._perplexities(open_source(self.model).load())}

    def _svd(self, keep: float, target: str | None) -> Row:
        """Truncate every matrix alone to the same share, under the second moment of the target's text or none."""
        calibration = CalibrationOptions("none")
        if target is not None:
            corpus = TextFile.of(self.training[target])
            calibration = CalibrationOptions(corpus, tokens=CALIBRATION, gradients=False)
        recipe = Recipe((Factorize(SINGLE, keep=keep, rank_multiple=1),), calibration)
        rewritten = rewrite_model(self.model, recipe, run=Run(device=str(self.device)))
        pairs = [finding for finding in rewritten.findings if finding.outcome.value == "applied"]
        kept = sum(pair.bytes_after for pair in pairs if pair.bytes_before)
        kept /= sum(pair.bytes_before for pair in pairs)
        return {"kept": kept, "perplexity": self._perplexities(rewritten.model)}

    def _basel(self, target: str, keep: float, importance: Any) -> Row:
        """Select bases on the target's text; the model that is judged has the products in its matrices' places."""
        source, whitened = open_source(self.model), importance == WHITENED
        options = BaselOptions(
            TextFile.of(self.training[target]),
            keep=keep,
            steps=self.steps,
            importance="magnitude" if whitened else importance,
            bases="whitened" if whitened else "plain",
            learning_rate=WHITENED_RATE if whitened else self.rate,
        )
        length = min(SEQUENCE, options.batch_tokens, int(source.config.max_position_embeddings))
        count = math.ceil(self.steps * options.batch_tokens / SEQUENCE)
        tokens = target_tokens(self.training[target], source.folder, length, count)
        state = self.work / f"basel-{target}-{keep}-{importance}-{self.steps}-{self.rate}.pt"
        state.parent.mkdir(parents=True, exist_ok=True)
        selection = select_basis(source, tokens, options.rule, options, device=self.device, state=state)
        details = selection.finding.details or {}
        told = ("kept", "steps", "tokens", "new_basis", "smallest_rank", "largest_rank", "dense")
        return {
            **{name: details[name] for name in told if name in details},
            "learning_rate": options.learning_rate,
            "text_tokens": tokens.numel(),
            "training_seconds": details["seconds"],
            "losses": [round(loss, 4) for _, loss in selection.losses],
            "perplexity": self._perplexities(source.then(Replaced(selection.tensors)).load()),
        }

    def _perplexities(self, model: Any) -> dict[str, list[float]]:
        """Return perplexity and its standard error by text, products in the type that the machine is fast in."""
        tokenizer, found = open_source(self.model).folder, {}
        logits = torch_logits(model.to(CPU).float())
        with matmuls_in(matmul_dtype(CPU), CPU):
            for name, path in self.texts.items():
                result = perplexity_of(logits, EvalText(path, CONTEXT, TOKENS), tokenizer)
                found[name] = [round(result.perplexity, 4), round(result.perplexity_error, 4)]
        return found
