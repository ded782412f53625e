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

from rk_export.methods import METHODS  # noqa: E402  after the variables above

if TYPE_CHECKING:
    from rk_export.cli.main import quiet_libraries
    from rk_export.commands.analyze import analyze
    from rk_export.commands.compare import compare
    from rk_export.commands.compress import compress, rewrite_model
    from rk_export.commands.deployment_files import deployment_files
    from rk_export.commands.dry_run import DryRun, dry_run
    from rk_export.commands.evaluate import evaluate
    from rk_export.commands.explain import explain
    from rk_export.commands.export import export
    from rk_export.commands.plan import make_plan
    from rk_export.commands.prepare import prepare
    from rk_export.commands.verify import verify
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
    from rk_export.manifest import library_versions
    from rk_export.model.torch_logits import torch_logits
    from rk_export.options.calibration import CalibrationOptions
    from rk_export.options.correct import Correct
    from rk_export.options.factorize import Factorize
    from rk_export.options.prepare import Prepare
    from rk_export.options.quantization import W8A8, QuantSpec
    from rk_export.options.quantize import Quantize
    from rk_export.options.ranks import Budget, RankRule
    from rk_export.options.recipe import Recipe
    from rk_export.options.run import Run
    from rk_export.options.target import Target
    from rk_export.options.texts import TextFile
    from rk_export.plan import Plan
    from rk_export.report.comparison import Comparison
    from rk_export.report.comparison_page import comparison_html
    from rk_export.report.records import Finding, ParityTier, Report
    from rk_export.report.render import findings_table, parity_text, text_table
    from rk_export.rewrite.apply import Rewritten
    from rk_export.rewrite.sizes import kept_parameters
    from rk_export.source.stored import StoredModel, open_source
    from rk_export.testing import assert_parity

_HOME = {
    "quiet_libraries": "rk_export.cli.main",
    "analyze": "rk_export.commands.analyze",
    "compare": "rk_export.commands.compare",
    "compress": "rk_export.commands.compress",
    "rewrite_model": "rk_export.commands.compress",
    "deployment_files": "rk_export.commands.deployment_files",
    "DryRun": "rk_export.commands.dry_run",
    "dry_run": "rk_export.commands.dry_run",
    "evaluate": "rk_export.commands.evaluate",
    "explain": "rk_export.commands.explain",
    "export": "rk_export.commands.export",
    "make_plan": "rk_export.commands.plan",
    "prepare": "rk_export.commands.prepare",
    "verify": "rk_export.commands.verify",
    "FusionError": "rk_export.errors",
    "InputError": "rk_export.errors",
    "ParityError": "rk_export.errors",
    "ProviderError": "rk_export.errors",
    "RkExportError": "rk_export.errors",
    "UnsupportedModelError": "rk_export.errors",
    "EvalText": "rk_export.evaluation.measure",
    "SpeedTest": "rk_export.evaluation.measure",
    "perplexity_of": "rk_export.evaluation.measure",
    "evaluate_models": "rk_export.evaluation.models",
    "score_table": "rk_export.evaluation.score_table",
    "load_tasks": "rk_export.evaluation.tasks",
    "library_versions": "rk_export.manifest",
    "torch_logits": "rk_export.model.torch_logits",
    "CalibrationOptions": "rk_export.options.calibration",
    "Correct": "rk_export.options.correct",
    "Factorize": "rk_export.options.factorize",
    "Prepare": "rk_export.options.prepare",
    "Quantize": "rk_export.options.quantize",
    "Target": "rk_export.options.target",
    "Recipe": "rk_export.options.recipe",
    "QuantSpec": "rk_export.options.quantization",
    "W8A8": "rk_export.options.quantization",
    "Budget": "rk_export.options.ranks",
    "RankRule": "rk_export.options.ranks",
    "Run": "rk_export.options.run",
    "TextFile": "rk_export.options.texts",
    "Plan": "rk_export.plan",
    "Comparison": "rk_export.report.comparison",
    "comparison_html": "rk_export.report.comparison_page",
    "Finding": "rk_export.report.records",
    "ParityTier": "rk_export.report.records",
    "Report": "rk_export.report.records",
    "findings_table": "rk_export.report.render",
    "parity_text": "rk_export.report.render",
    "text_table": "rk_export.report.render",
    "Rewritten": "rk_export.rewrite.apply",
    "kept_parameters": "rk_export.rewrite.sizes",
    "StoredModel": "rk_export.source.stored",
    "open_source": "rk_export.source.stored",
    "check_signature": "rk_export.signature",
    "sign_bundle": "rk_export.signature",
    "assert_parity": "rk_export.testing",
}
__all__ = [
    "W8A8",
    "Budget",
    "CalibrationOptions",
    "Comparison",
    "Correct",
    "DryRun",
    "EvalText",
    "Factorize",
    "Finding",
    "FusionError",
    "InputError",
    "ParityError",
    "ParityTier",
    "Plan",
    "Prepare",
    "ProviderError",
    "QuantSpec",
    "Quantize",
    "RankRule",
    "Recipe",
    "Report",
    "Rewritten",
    "RkExportError",
    "Run",
    "SpeedTest",
    "StoredModel",
    "Target",
    "TextFile",
    "UnsupportedModelError",
    "analyze",
    "assert_parity",
    "check_signature",
    "compare",
    "comparison_html",
    "compress",
    "deployment_files",
    "dry_run",
    "evaluate",
    "evaluate_models",
    "explain",
    "export",
    "findings_table",
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
    "sign_bundle",
    "text_table",
    "torch_logits",
    "verify",
]
# The options of a method are public as soon as the method is listed.
_HOME |= {kind.__name__: kind.__module__ for kind in METHODS}
__all__ += [kind.__name__ for kind in METHODS]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
