"""Several models, texts and tasks side by side: dense models and checkpoints in PyTorch, bundles in ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig

from rk_export.errors import InputError
from rk_export.evaluation.log_likelihood import PairEncoder
from rk_export.evaluation.measure import EvalText, check_text, context_length, encoder_refused, perplexity_of
from rk_export.evaluation.multiple_choice import TaskResult, score_task
from rk_export.evaluation.perplexity import PerplexityResult
from rk_export.evaluation.tasks import Task
from rk_export.model.torch_logits import torch_logits
from rk_export.rewrite.checkpoint import is_checkpoint, load_pretrained
from rk_export.runtime import Session
from rk_export.runtime.bundle_config import BundleConfig, rotary_switch
from rk_export.runtime.bundle_files import MODEL_FILE, TOKENIZER_FILE
from rk_export.runtime.encoder_graph import is_encoder_bundle
from rk_export.runtime.graph_proto import read_facts
from rk_export.runtime.providers import Provider, SessionSettings
from rk_export.runtime.text import TextCodec
from rk_export.source.adapter import is_adapter
from rk_export.source.memory import Memory
from rk_export.source.stored import open_source, read_config
from rk_export.source.transformed import Transformed
from rk_export.text import LogitsFn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to be evaluated, its weights not yet loaded.

    Args:
        name: What the user called it.
        folder: Holds its tokenizer.
        max_length: Most tokens that it takes.
        rows: Rows of its embedding.
        rotary_switch: Longest sequence under LongRoPE's short factors; None where one rotation serves all.
        load: Loads it and returns its logits function.
    """

    name: str
    folder: Path
    max_length: int
    rows: int
    rotary_switch: int | None
    load: Callable[[], LogitsFn]


@dataclass(frozen=True)
class ModelScores:
    """What was measured of one model.

    Args:
        model: What the user called it.
        texts: Perplexity by the name of the text.
        tasks: Scores by the name of the task.
    """

    model: str
    texts: dict[str, PerplexityResult]
    tasks: dict[str, TaskResult]


def open_evaluated(
    model: str | Path,
    option: str,
    *,
    base: str | Path | None = None,
    provider: Provider = "auto",
    threads: int | None = None,
) -> EvaluatedModel:
    """Return a dense model or checkpoint, to run in PyTorch, or a bundle, to run in ONNX Runtime.

    Args:
        model: HF folder, hub id, GGUF file, LoRA adapter, checkpoint or bundle.
        option: The option that asks for a decoder, for messages.
        base: Base model of a LoRA adapter; None takes the one that it names.
        provider: Execution provider, of a bundle.
        threads: Threads of ONNX Runtime, of a bundle.

    Raises:
        InputError: Nothing usable is there, or the model is an encoder.
    """
    folder = Path(model).expanduser()
    made_here = (folder / MODEL_FILE).is_file() or (folder.is_dir() and is_checkpoint(folder))
    if base is not None and made_here:
        raise InputError(
            "goes with a LoRA adapter",
            where="--base",
            fix=f"drop it: {folder.name} is a checkpoint or bundle",
        )
    if (folder / MODEL_FILE).is_file():
        SessionSettings(provider, threads)  # refuses what it cannot take before any work
        if is_encoder_bundle(folder):
            raise encoder_refused(folder.name, option)

        def session_logits() -> LogitsFn:
            return Session.from_pretrained(folder, provider=provider, threads=threads).prefill_logits

        return EvaluatedModel(str(model), folder, *_bundle_limits(folder), session_logits)
    if folder.is_dir() and is_checkpoint(folder):
        config = read_config(folder)
        limits = _limits(config, option)
        return EvaluatedModel(
            str(model), folder, *limits, lambda: torch_logits(load_pretrained(folder).model)
        )
    source = open_source(model, base)
    limits = _limits(source.config, option)
    mapped = Transformed(source, memory=Memory())
    return EvaluatedModel(str(model), source.folder, *limits, lambda: torch_logits(mapped.shared()))


def _limits(config: PretrainedConfig, option: str) -> tuple[int, int, int | None]:
    """Return context length, rows of the embedding and switch of the rotation of a PyTorch model."""
    return context_length(config, option), int(config.vocab_size), rotary_switch(config.to_dict())


def _bundle_limits(folder: Path) -> tuple[int, int, int | None]:
    """Return what `_limits` does, of a bundle."""
    config = BundleConfig.read(folder)
    rows = read_facts(config.model_path).embedding_rows
    rows = config.vocab_size if rows is None else rows
    for value, what in ((config.context_length, "context length"), (rows, "vocabulary size")):
        if value is None:
            raise InputError(f"no {what} is known", where=str(folder), fix="export the bundle again")
    return int(config.context_length or 0), int(rows or 0), config.rotary_switch


def evaluate_models(
    models: Sequence[str | Path],
    *,
    texts: Sequence[EvalText] = (),
    tasks: Sequence[Task] = (),
    base: str | Path | None = None,
    provider: Provider = "auto",
    threads: int | None = None,
) -> list[ModelScores]:
    """Measure every model on every text and task; one model is in memory at a time.

    Args:
        models: As in `open_evaluated`.
        texts: Texts to measure perplexity on.
        tasks: Tasks to ask; `load_tasks` reads them.
        base: Base model of the LoRA adapters among the models; None takes the one that each names.
        provider: Execution provider of bundles.
        threads: Threads of ONNX Runtime.

    Raises:
        InputError: There is nothing to measure, or a model, text or item cannot be used; what can be seen without
            computing is refused before the first model is loaded.
    """
    if not texts and not tasks:
        raise InputError("nothing to measure", where="eval", fix="give --text FILE or --tasks NAME")
    option = "--text" if texts else "--tasks"
    opened = [
        open_evaluated(model, option, base=_base_of(model, models, base), provider=provider, threads=threads)
        for model in models
    ]
    for model in opened:
        TextCodec(model.folder / TOKENIZER_FILE)
        for text in texts:
            check_text(text, model.folder, model.max_length, model.rows)
    return [_scores(model, texts, tasks) for model in opened]


def _base_of(model: str | Path, models: Sequence[str | Path], base: str | Path | None) -> str | Path | None:
    """Return the base model where one of several models is an adapter; where none is, all are asked to take it."""
    adapters = [other for other in models if is_adapter(Path(other).expanduser())]
    return base if model in adapters or not adapters else None


def _scores(model: EvaluatedModel, texts: Sequence[EvalText], tasks: Sequence[Task]) -> ModelScores:
    logger.info("evaluating %s", model.name)
    logits = model.load()
    encoder = PairEncoder(TextCodec(model.folder / TOKENIZER_FILE), model.rows)
    ask = partial(score_task, max_length=model.max_length, rotary_switch=model.rotary_switch)
    names = short_names([str(text.path) for text in texts])
    return ModelScores(
        model.name,
        {name: perplexity_of(logits, text, model.folder) for name, text in zip(names, texts, strict=True)},
        {task.name: ask(logits, task, encoder) for task in tasks},
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last part of each path, or the paths as they are where that would not tell them apart."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
