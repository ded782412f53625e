"""rk-export: compress, export, deploy and verify language models on ONNX Runtime.

Importing the package loads neither PyTorch nor ONNX; a name loads its module when it is first used. It turns the
telemetry of the libraries off unless the environment says otherwise.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Read once, when ONNX Runtime, GenAI and huggingface_hub are imported: the first two record the device and their use in
# a database under the user's cache, the last tells the hub which software asks. Whoever wants that sets them to 0.
for _variable in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_variable, "1")

if TYPE_CHECKING:
    from rk_export.cli.main import quiet_libraries
    from rk_export.commands.analyze import analyze
    from rk_export.commands.pipeline import (
        compress,
        dry_run,
        evaluate,
        explain,
        export,
        make_plan,
        prepare,
        rewrite_model,
        verify,
    )
    from rk_export.errors import (
        FusionError,
        InputError,
        ParityError,
        ProviderError,
        RkExportError,
        UnsupportedModelError,
    )
    from rk_export.evaluation.measure import EvalText, SpeedTest, perplexity_of
    from rk_export.evaluation.models import evaluate_models
    from rk_export.evaluation.score_table import score_table
    from rk_export.evaluation.tasks import load_tasks
    from rk_export.folders import library_versions
    from rk_export.model.torch_logits import torch_logits
    from rk_export.options.compress import Budget, CalibrationOptions, CompressOptions, QuantSpec, RankRule
    from rk_export.options.methods import BaselOptions, CapOptions, PruneOptions
    from rk_export.options.presets import basel, cap, joint_rank
    from rk_export.plan import Plan
    from rk_export.report.records import Report
    from rk_export.report.render import findings_table, parity_text, text_table
    from rk_export.rewrite.apply import Rewritten
    from rk_export.rewrite.sizes import kept_parameters
    from rk_export.source.stored import ModelSource, open_source
    from rk_export.testing import assert_parity

_NAMES = {
    # what is done
    "rk_export.commands.analyze": ("analyze",),
    "rk_export.commands.pipeline": (
        *("compress", "dry_run", "evaluate", "explain", "export", "make_plan", "prepare"),
        *("rewrite_model", "verify"),
    ),
    "rk_export.evaluation.models": ("evaluate_models",),
    "rk_export.testing": ("assert_parity",),
    # what may be asked for
    "rk_export.options.compress": (
        *("Budget", "CalibrationOptions", "CompressOptions", "QuantSpec", "RankRule"),
    ),
    "rk_export.options.methods": ("BaselOptions", "CapOptions", "PruneOptions"),
    "rk_export.options.presets": ("basel", "cap", "joint_rank"),
    # what is measured, and on what
    "rk_export.evaluation.measure": ("EvalText", "SpeedTest", "perplexity_of"),
    "rk_export.evaluation.tasks": ("load_tasks",),
    "rk_export.model.torch_logits": ("torch_logits",),
    "rk_export.rewrite.sizes": ("kept_parameters",),
    # what comes of it
    "rk_export.plan": ("Plan",),
    "rk_export.report.records": ("Report",),
    "rk_export.rewrite.apply": ("Rewritten",),
    "rk_export.source.stored": ("ModelSource", "open_source"),
    "rk_export.errors": (
        *("FusionError", "InputError", "ParityError", "ProviderError", "RkExportError"),
        "UnsupportedModelError",
    ),
    # how it is shown
    "rk_export.report.render": ("findings_table", "parity_text", "text_table"),
    "rk_export.evaluation.score_table": ("score_table",),
    "rk_export.folders": ("library_versions",),
    "rk_export.cli.main": ("quiet_libraries",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "BaselOptions",
    "Budget",
    "CalibrationOptions",
    "CapOptions",
    "CompressOptions",
    "EvalText",
    "FusionError",
    "InputError",
    "ModelSource",
    "ParityError",
    "Plan",
    "ProviderError",
    "PruneOptions",
    "QuantSpec",
    "RankRule",
    "Report",
    "Rewritten",
    "RkExportError",
    "SpeedTest",
    "UnsupportedModelError",
    "analyze",
    "assert_parity",
    "basel",
    "cap",
    "compress",
    "dry_run",
    "evaluate",
    "evaluate_models",
    "explain",
    "export",
    "findings_table",
    "joint_rank",
    "kept_parameters",
    "library_versions",
    "load_tasks",
    "make_plan",
    "open_source",
    "parity_text",
    "perplexity_of",
    "prepare",
    "quiet_libraries",
    "rewrite_model",
    "score_table",
    "text_table",
    "torch_logits",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
