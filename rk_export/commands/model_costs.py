"""What a model costs on this machine: its products in every format, and all that is not a product."""

from __future__ import annotations

from dataclasses import replace
from os import cpu_count
from pathlib import Path
from tempfile import TemporaryDirectory

from rk_export.bundle.write import write_configs
from rk_export.graph.build import build_graph, save_graph
from rk_export.options.calibration import UNWEIGHED
from rk_export.options.recipe import Recipe
from rk_export.planning import planner
from rk_export.planning.budget_units import timed_formats
from rk_export.planning.cost_table import DECODED, TOKENS, CostTable, Phase, measure_costs
from rk_export.rewrite.apply import rewrite
from rk_export.runtime import bench
from rk_export.source.protocol import Source

_DENSE = Recipe(calibration=UNWEIGHED)


def model_costs(
    dense: Source, source: Source, recipe: Recipe, phase: Phase, threads: int | None
) -> CostTable:
    """Measure the time of a dense model in floats and of its matrix products in every format.

    Args:
        dense: The dense model; its graph is written to a temporary folder and timed.
        source: The model that is compressed; its products are timed.
        recipe: The formats that it fixes are timed too.
        phase: `prefill` or `decode`.
        threads: Threads of ONNX Runtime; None takes all cores.
    """
    shapes = [matrix.shape for matrix in source.description.matrices]
    table = measure_costs(shapes, timed_formats(source, recipe), phase, threads=threads)
    with TemporaryDirectory() as folder:
        _write_dense(dense, Path(folder))
        result = bench(
            [folder],
            prompt_tokens=TOKENS["prefill"],
            new_tokens=DECODED,
            threads=threads or cpu_count() or 1,
        ).rows[0]
    speed = result.prefill_median if phase == "prefill" else result.decode_median
    products = sum(table.milliseconds(rows, columns, None) for rows, columns in shapes)
    return replace(table, rest=max(0.0, 1e3 * TOKENS[phase] / speed - products))


def _write_dense(source: Source, folder: Path) -> None:
    """Write a model's dense graph and what a session needs beside it."""
    rewritten = rewrite(source, planner.decide_plan(source, _DENSE))
    graph, _ = build_graph(rewritten)
    save_graph(graph, folder)
    write_configs(folder, rewritten, source.folder, source.origin[1])
