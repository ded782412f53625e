"""Shared by the tests of compressed models: compress a tiny source, run it in PyTorch and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from made_recipes import made_recipe
from torch import Tensor
from transformers import PreTrainedModel

from rk_export.graph.build import build_graph, save_graph
from rk_export.options.calibration import UNWEIGHED
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.options.recipe import Recipe
from rk_export.plan import Plan
from rk_export.planning.planner import decide_plan
from rk_export.report.records import Fusion
from rk_export.rewrite.apply import Rewritten, rewrite
from rk_export.runtime.graph_proto import graph_bytes
from rk_export.source.stored import StoredModel

INT4 = QuantSpec(4, 16)
SourceOf = Callable[..., StoredModel]
Past = dict[str, np.ndarray]


def floats(groups: tuple[str, ...] = (), **options: Any) -> Recipe:
    """Return a recipe that quantizes nothing and computes in floats."""
    fields = {
        "quant": None,
        "table": None,
        "accuracy_level": 0,
        "calibration": UNWEIGHED,
        "quantizer": "rtn",
    }
    return made_recipe(groups=groups, **{**fields, **options})


def compress(source: StoredModel, recipe: Recipe, probe: Tensor | None = None) -> Rewritten:
    """Plan and rewrite."""
    return rewrite(source, decide_plan(source, recipe), probe=probe)


def full_rank_plan(source: StoredModel, group: str, qk: Any = "whole") -> Plan:
    """Return a plan that factorizes one group at the rank at which nothing is lost."""
    plan = decide_plan(source, floats((group,), qk=qk, rank=RankRule("rank", 1)))
    model = source.skeleton()
    sites = []
    for site in plan.sites:
        if site.form != "dense":
            layer = model.get_submodule(f"{source.architecture.layers}.{site.layer}")
            source.architecture.canonicalize(layer)
            linears: list[Any] = [layer.get_submodule(path) for path in site.paths]
            pairs = source.description.heads.kv_heads if site.form == "per_head" else 1
            rows = sum(linear.out_features for linear in linears) // pairs
            site = replace(site, rank=min(rows, linears[0].in_features))
        sites.append(site)
    return replace(plan, sites=tuple(sites))


def tokens(source: StoredModel, batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Return random token ids; none is the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, source.config.vocab_size, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """Return logits, or the last hidden state of an encoder."""
    output = model(input_ids=input_ids, **inputs)
    result: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return result


class OnnxFile:
    """The graph of a bundle in ONNX Runtime, CPU provider, one thread.

    Args:
        folder: Where model.onnx is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def session(self) -> ort.InferenceSession:
        """The session; MatMulNBits computes at the level that the plan asks for."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        return ort.InferenceSession(self.folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def run(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        past: Past | None = None,
        **extra: np.ndarray,
    ) -> tuple[Tensor, Past]:
        """Run the graph; returns logits (or hidden states) and the present cache by the names of the past."""
        ids = input_ids.numpy()
        mask_array = np.ones_like(ids) if mask is None else mask.numpy()
        feed: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": mask_array, **extra}
        for value in self.session.get_inputs():
            if value.name.startswith("past_"):
                feed[value.name] = _empty(value, len(ids)) if past is None else past[value.name]
            elif value.name not in feed:
                feed[value.name] = np.zeros_like(ids)
        names = [value.name for value in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(names, feed), strict=True))
        first = torch.from_numpy(outputs.pop(names[0]))
        return first, {_as_past(name): array for name, array in outputs.items()}


def _empty(value: Any, batch: int) -> np.ndarray:
    """Return what is given for a past that is not there: no position of a cache, zeros of a state."""
    sizes = (size if isinstance(size, int) else 0 for size in value.shape[1:])
    return np.zeros((batch, *sizes), np.float16 if value.type == "tensor(float16)" else np.float32)


def _as_past(name: str) -> str:
    """Return the input that an output of the step before goes into."""
    return name.replace("present.", "past_key_values.").replace("present_", "past_")


class OnnxModel(OnnxFile):
    """The exported graph of a rewritten model in ONNX Runtime, CPU provider.

    Args:
        rewritten: The model.
        folder: Where the graph is written.
        **options: Of `build_graph`.
    """

    def __init__(self, rewritten: Rewritten, folder: Path, **options: bool) -> None:
        super().__init__(folder)
        self.graph, self.fusions = build_graph(rewritten, **options)
        save_graph(self.graph, folder)

    def fusion(self, pattern: str) -> Fusion:
        """Return one line of the fusion report."""
        return next(fusion for fusion in self.fusions if fusion.pattern == pattern)


def level_0(model: OnnxFile, ids: Tensor) -> Tensor:
    """Return the logits with float inputs, as the runtime computes them at accuracy level 0."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(model.folder)
    )
    graph, _ = graph_bytes(model.folder / "model.onnx", 0)
    assert b"MatMulIntegerToFloat" not in graph
    model.session = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    return model.run(ids)[0]
