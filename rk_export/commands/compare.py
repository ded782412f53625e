"""Several bundles side by side, with dense models and checkpoints among them where their quality is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rk_export.commands.compared import is_bundle, opened
from rk_export.errors import InputError
from rk_export.evaluation.measure import EvalText, SpeedTest
from rk_export.evaluation.models import ModelScores, evaluate_models, short_names
from rk_export.evaluation.perplexity import paired_perplexity
from rk_export.evaluation.score_table import paired_difference
from rk_export.evaluation.tasks import Task
from rk_export.report.comparison import Compared, Comparison, Score
from rk_export.runtime import bench
from rk_export.runtime.bundle_config import BundleConfig
from rk_export.runtime.providers import Provider


def compare(
    models: Sequence[str | Path],
    *,
    texts: Sequence[EvalText] = (),
    tasks: Sequence[Task] = (),
    speed: SpeedTest | None = None,
    base: str | Path | None = None,
    provider: Provider = "auto",
    threads: int | None = None,
    command: str = "",
) -> Comparison:
    """Put models side by side: size, quality, speed, parity, and what became of each matrix.

    Args:
        models: Bundles; with `texts` or `tasks` also dense models and checkpoints. Differences are to the first one.
        texts: Measure perplexity on them.
        tasks: Ask every model their items; `load_tasks` reads them.
        speed: Measure the bundles' speed in turns.
        base: Base model of the LoRA adapters among the models.
        provider: Execution provider of bundles.
        threads: Threads of ONNX Runtime.
        command: Command line to note on the page.

    Raises:
        InputError: Fewer than two models, or one of them cannot be compared; what can be seen without computing is
            refused before anything is measured.
    """
    if len(models) < 2:
        raise InputError("at least two models are needed", where="compare", fix="name another bundle")
    names = short_names([str(model).rstrip("/") for model in models])
    if len(set(names)) < len(names):
        raise InputError("a model is named twice", where="compare", fix="name each model once")
    measured = bool(texts or tasks)
    compared = [opened(model, name, measured, base) for model, name in zip(models, names, strict=True)]
    if measured:
        scores = evaluate_models(
            models, texts=texts, tasks=tasks, base=base, provider=provider, threads=threads
        )
        found = [_scores(one, scores[0]) for one in scores]
        compared = [replace(one, scores=tuple(mine)) for one, mine in zip(compared, found, strict=True)]
    if speed is not None:
        compared = _with_speed(models, compared, speed, provider, threads)
    return Comparison(tuple(compared), command=command)


def _scores(mine: ModelScores, first: ModelScores) -> Iterator[Score]:
    """Yield every score of a model, with the paired difference to the first one unless it is that one."""
    for name, result in mine.texts.items():
        paired = None if mine is first else paired_perplexity(result, first.texts[name])
        yield _score(name, "perplexity", (result.perplexity, result.perplexity_error), paired)
    for name, task in mine.tasks.items():
        theirs = first.tasks[name]
        for measure, answers in (("acc", "right"), ("acc_norm", "right_norm")):
            value = getattr(task, measure)
            if value is None:
                continue
            pair = getattr(task, answers), getattr(theirs, answers)
            paired = None if mine is first else paired_difference(*pair)
            yield _score(name, measure, (value, getattr(task, f"{measure}_error")), paired)


def _score(on: str, measure: str, found: tuple[float, float], paired: tuple[float, float] | None) -> Score:
    difference, its_error = paired or (None, None)
    return Score(on, measure, found[0], _known(found[1]), difference, _known(its_error))


def _known(error: float | None) -> float | None:
    return None if error is None or math.isnan(error) else error


def _with_speed(
    models: Sequence[str | Path],
    compared: Sequence[Compared],
    speed: SpeedTest,
    provider: Provider,
    threads: int | None,
) -> list[Compared]:
    """Return the models with the speed of every bundle, measured in turns."""
    paths = [Path(model).expanduser() for model in models]
    racing = [index for index, path in enumerate(paths) if is_bundle(path)]
    if not racing:
        raise InputError("only bundles can be timed", where="--speed", fix="drop it, or name a bundle")
    context = min(BundleConfig.read(paths[index]).context_length or 2**31 for index in racing)
    test = speed.within(context)
    result = bench(
        [paths[index] for index in racing],
        prompt_tokens=test.prompt_tokens,
        new_tokens=test.new_tokens,
        repeats=test.repeats,
        threads=threads or 2,
        provider=provider,
    )
    timed = [replace(one, speed={}) for one in compared]
    for index, row in zip(racing, result.rows, strict=True):
        speeds = {"prefill": row.prefill_median, "decode": row.decode_median}
        timed[index] = replace(timed[index], speed=speeds)
    return timed
