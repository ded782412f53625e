"""The published systems as options: what each leaves open is asked for, everything else is as published.

All of them store floats unless quantization is asked for, and end in the same verified bundle as any other options.
"""

from __future__ import annotations

from rk_export.options.compress import Budget, CalibrationOptions, CompressOptions, RankRule
from rk_export.options.methods import BaselOptions, CapOptions

METHODS = ("joint-rank", "basel", "cap")

# A factor pair is exact or as published: nothing is weighed by statistics, so no text is written for them.
_UNWEIGHED = CalibrationOptions("none")


def joint_rank(rank: RankRule) -> CompressOptions:
    """Return data-free joint rank-k approximation (2402.16319): q/k and gate/up joined, no metric."""
    return CompressOptions(
        rank=rank,
        quant=None,
        embedding_quant=None,
        prepare=(),
        quantizer="rtn",
        calibration=_UNWEIGHED,
    )


def basel(rank: RankRule, options: BaselOptions) -> CompressOptions:
    """Return basis selection for a target task (2405.15877)."""
    return CompressOptions(
        groups=(),
        rank=rank,
        basel=options,
        quant=None,
        embedding_quant=None,
        prepare=(),
        quantizer="rtn",
        calibration=_UNWEIGHED,
    )


def cap(budget: Budget, options: CapOptions | None = None) -> CompressOptions:
    """Return global rank and sparsity optimization (2505.03801).

    Matrices are not rotated before: that would spread the entries that the sparse part is to hold.
    """
    return CompressOptions(
        groups=(),
        budget=budget,
        cap=options or CapOptions(),
        quant=None,
        embedding_quant=None,
        prepare=(),
    )
