"""From a site's statistics to the metrics of its factor pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.passes.base import SiteStatistics
from rk_export.passes.numerics.metric import Metric


@dataclass(frozen=True)
class SiteMetric:
    """What `joint_factors` minimizes for one factor pair; without moments all inputs and outputs weigh alike.

    Args:
        inputs: Metric of the common input.
        outputs: Metric of the stacked members' output gradients, a block for each.
        cross: E[x₀ xᵀ] (in, in), where the target is corrected.
    """

    inputs: Metric | None = None
    outputs: Metric | None = None
    cross: Tensor | None = None

    @property
    def name(self) -> str:
        """What is weighed, for the report."""
        parts = {"inputs": self.inputs, "target": self.cross, "outputs": self.outputs}
        return " and ".join(part for part, metric in parts.items() if metric is not None) or "none"


def site_metrics(
    statistics: SiteStatistics | None, rows: Mapping[str, int], groups: int, device: torch.device
) -> Iterator[SiteMetric]:
    """Yield the metric of each of a site's factor pairs.

    Args:
        statistics: Of the site; None weighs all alike.
        rows: Rows of each member in one pair.
        groups: Number of pairs: KV groups when per head, else 1.
        device: Where the factorization runs.

    Raises:
        ValueError: If a moment is no second moment, or only some members have gradient moments.
    """
    if statistics is None:
        yield from [SiteMetric()] * groups
        return
    cross = statistics.inputs.cross
    cross = None if cross is None else cross.to(device)
    inputs = Metric.of(statistics.inputs.second.to(device))
    for group in range(groups):
        yield SiteMetric(inputs, _output_metric(rows, group, statistics.outputs, device), cross)


def _output_metric(
    rows: Mapping[str, int], group: int, moments: Mapping[str, Tensor], device: torch.device
) -> Metric | None:
    """Return the metric of the stacked outputs of one group, or None where no gradients were taken.

    `moments` are (out, out), or (out,) where only the diagonal is known.
    """
    if not moments:
        return None
    if missing := sorted(set(rows) - set(moments)):
        raise ValueError(f"no gradient moment of {', '.join(missing)}")
    blocks = []
    for role, size in rows.items():
        own, moment = slice(group * size, (group + 1) * size), moments[role]
        blocks.append(Metric.of((moment[own] if moment.ndim == 1 else moment[own, own]).to(device)))
    return Metric.stacked(blocks)
