"""Layers finished ahead of the rewrite by several processes, where they do not depend on each other."""

from __future__ import annotations

import logging
from pathlib import Path

from rk_export.calibration.layer_statistics import Stationary
from rk_export.options.run import Run
from rk_export.planning.planner import check_plan
from rk_export.rewrite.layer_work import LayerWork, forget_handed
from rk_export.rewrite.ray_cluster import finish_on_cluster
from rk_export.rewrite.workers import finish_in_processes

logger = logging.getLogger(__name__)


def finish_ahead(work: LayerWork, folder: Path, run: Run) -> None:
    """Finish the layers of a model in the processes that were asked for; `rewrite` finds them in the store.

    Nothing is done where one process was asked for, or where every layer needs those before it, which is logged.

    Args:
        work: What to do.
        folder: Takes tensors that the processes read.
        run: How many processes, and where.

    Raises:
        InputError: If the plan belongs to another model, or the cluster cannot be used.
        RkExportError: As `finish_in_processes`.
    """
    if run.workers == 1 and run.ray is None:
        return
    check_plan(work.source, work.plan)
    if not isinstance(work.statistics, Stationary):
        logger.warning(
            "layers are finished one by one, not by workers: with calibration.prefix the statistics of a layer are "
            "taken through the rewritten layers before it"
        )
        return
    if not work.missing:
        return
    try:
        if run.ray is None:
            finish_in_processes(work, folder, run.workers)
        else:
            finish_on_cluster(work, folder, run.ray)
    finally:
        forget_handed(folder)
