"""What all parts share: the protocol, the models in memory, their truncations, and how a part is described."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from assets import wiki_text
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from measure.harness import Measure, Row, Rows
from papers.joint_rank.ladder import GROUPS, RankLadder
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export import CalibrationOptions, EvalText, Factorize, Recipe, StoredModel
from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.recorders import InputRecorder, recording
from rk_export.commands.compression_inputs import compression_inputs
from rk_export.device import matmul_dtype, matmuls_in
from rk_export.matrix_id import MatrixId
from rk_export.text import tokens_of

MetricName = Literal["none", "self"]
METRICS: tuple[MetricName, ...] = ("none", "self")
CLEAN = "clean"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Protocol:
    """What every figure depends on; results of another protocol are not mixed in.

    Args:
        model: Folder, hub id or GGUF file; empty for SmolLM2-135M-Instruct.
        text: Text for perplexity; empty for the packaged Wikipedia prose.
        tokens: Of that text, in `figure3`.
        short_tokens: The same in all other parts.
        context: Tokens of a window.
        task: Name or file of the task of `figure4`.
        items: Of the task.
        calibration_tokens: Of the metric `self`.
        steps: Most steps of fine-tuning in `watermark`.
        learning_rate: Of fine-tuning.
    """

    model: str = ""
    text: str = ""
    tokens: int = 5120
    short_tokens: int = 2560
    context: int = 512
    task: str = "openbookqa"
    items: int = 250
    calibration_tokens: int = 8192
    steps: int = 80
    learning_rate: float = 3e-5


@dataclass
class Study:
    """The model and what is known about it, loaded when a row needs it.

    Args:
        protocol: What to measure on.
        work: Folder of models that are made on the way.
        makers: How each model is had, by name; `CLEAN` is the dense one.
    """

    protocol: Protocol
    work: Path
    makers: Mapping[str, Callable[[Study], StoredModel]]
    _sources: dict[str, StoredModel] = field(default_factory=dict, init=False)
    _models: dict[str, PreTrainedModel] = field(default_factory=dict, init=False)
    _statistics: dict[str, DenseStatistics] = field(default_factory=dict, init=False)
    _ladder: tuple[object, RankLadder] | None = field(default=None, init=False)

    def source_of(self, name: str) -> StoredModel:
        """Return the files of a model, made on first use."""
        if name not in self._sources:
            self._sources[name] = self.makers[name](self)
        return self._sources[name]

    def model_of(self, name: str) -> PreTrainedModel:
        """Return a model in memory; whoever changes it puts it back."""
        if name not in self._models:
            self._models[name] = self.source_of(name).load()
        return self._models[name]

    @property
    def source(self) -> StoredModel:
        """The dense model's files."""
        return self.source_of(CLEAN)

    @property
    def model(self) -> PreTrainedModel:
        """The dense model in memory."""
        return self.model_of(CLEAN)

    @cached_property
    def real_inputs(self) -> dict[MatrixId, Tensor]:
        """Second moments of what the dense model's matrices read on the text."""
        layers = self.model.get_submodule(self.source.architecture.layers)
        modules = {
            (index, item.path): layer.get_submodule(item.path)
            for index, layer in enumerate(layers.children())
            for item in self.source.architecture.projections(self.source.config, index)
        }
        ids = torch.as_tensor(tokens_of(self.text.path, self.source.folder)[: self.protocol.short_tokens])
        recorder = InputRecorder()
        with recording(modules, recorder.record), torch.no_grad(), matmuls_in(matmul_dtype(CPU), CPU):
            for window in torch.split(ids, self.protocol.context):
                self.model(input_ids=window[None], use_cache=False)
        return recorder.second()

    def linears(self, model: PreTrainedModel, group: str) -> list[list[nn.Linear]]:
        """Return the matrices of a group, layer by layer."""
        paths = self.paths(group)
        layers = model.get_submodule(self.source.architecture.layers)
        return [[cast(nn.Linear, layer.get_submodule(path)) for path in paths] for layer in layers.children()]

    def paths(self, group: str) -> list[str]:
        """Return the paths of a group's matrices within a layer."""
        items = self.source.architecture.projections(self.source.config, 0)
        return [item.path for item in items if item.role in GROUPS[group]]

    @cached_property
    def text(self) -> EvalText:
        """The text for perplexity."""
        return EvalText(Path(self.protocol.text or wiki_text("eval")), self.protocol.context, None)

    @torch.enable_grad()
    def statistics(self, metric: MetricName, name: str = CLEAN) -> DenseStatistics | None:
        """Return a model's statistics, from text that it writes itself; None for the metric `none`."""
        if metric == "none":
            return None
        if name not in self._statistics:
            calibration = CalibrationOptions(metric, tokens=self.protocol.calibration_tokens)
            recipe = Recipe((Factorize(keep=0.9),), calibration)
            found = compression_inputs(self.source_of(name), recipe).statistics
            if found is None:
                raise RuntimeError("the metric self gathers statistics")
            self._statistics[name] = found
        return self._statistics[name]

    def ladder(
        self,
        groups: tuple[str, ...],
        metric: MetricName,
        *,
        per_head: bool = False,
        name: str = CLEAN,
        noise: float = 0.0,
    ) -> RankLadder:
        """Return the truncations of groups of a model; the last ladder asked for is kept.

        Args:
            groups: Names of `GROUPS`.
            metric: Its statistics are those of the model without noise.
            per_head: As in `RankLadder.of`.
            name: Of the model.
            noise: Size of the noise that the weights carry now; it tells ladders apart.
        """
        key = (groups, metric, per_head, name, noise)
        if self._ladder is None or self._ladder[0] != key:
            self._ladder = None  # frees the factors before others are made
            known = self.statistics(metric, name)
            architecture = self.source_of(name).architecture
            ladder = RankLadder.of(
                self.model_of(name), architecture, groups, per_head=per_head, statistics=known
            )
            self._ladder = key, ladder
        return self._ladder[1]

    @torch.no_grad()
    def losses(self, model: PreTrainedModel, tokens: int) -> Row:
        """Return perplexity on the text and the mean loss of each window, in nats."""
        ids = torch.as_tensor(tokens_of(self.text.path, self.source.folder)[:tokens])
        nlls = []
        with matmuls_in(matmul_dtype(CPU), CPU):
            for window in torch.split(ids, self.protocol.context):
                if len(window) == self.protocol.context:
                    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
                    nlls.append(float(nn.functional.cross_entropy(logits, window[1:])))
        mean, error = mean_and_error(nlls)
        return {"perplexity": exp(mean), "nll": mean, "nll_error": error, "nlls": nlls}


@dataclass(frozen=True)
class Part:
    """One experiment.

    Args:
        name: As ``--parts`` knows it.
        title: Its heading.
        method: What was done, one paragraph.
        rows: Yields key and measurement of every row, in the order in which they are best measured.
        tables: Yields Markdown tables.
        reading: Yields what the rows say, a sentence or two each.
        draw: Draws them; None where there is nothing yet.
    """

    name: str
    title: str
    method: str
    rows: Callable[[Study], Iterator[tuple[str, Measure]]]
    tables: Callable[[Rows], Iterator[str]]
    reading: Callable[[Rows], Iterator[str]]
    draw: Callable[[Rows], Figure | None]


def exp(value: float) -> float:
    """Return e to a power, infinite where a float overflows."""
    return math.exp(value) if value < 700 else math.inf


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, NaN for a single value."""
    if len(values) == 1:
        return float(values[0]), math.nan
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) / math.sqrt(array.size)


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of two series over the same items, and its standard error."""
    return mean_and_error([a - b for a, b in zip(first, second, strict=True)])


def listed(values: Sequence[object]) -> str:
    """Return values as a list in prose."""
    return ", ".join(str(value) for value in values) or "none"


def log_scale(panel: Any) -> None:
    """Let the axis upwards be logarithmic, its labels plain numbers; call it after drawing."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if high < 8 * low else NullFormatter())
