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
    from rk_export.commands.analyze import analyze
    from rk_export.commands.compress import compress, dry_run
    from rk_export.commands.evaluate import evaluate
    from rk_export.commands.export import export
    from rk_export.commands.plan import make_plan
    from rk_export.commands.verify import verify
    from rk_export.errors import RkExportError
    from rk_export.evaluation.measure import EvalText, SpeedTest
    from rk_export.options.compress import CompressOptions
    from rk_export.options.quantization import QuantSpec
    from rk_export.options.ranks import RankRule
    from rk_export.plan import Plan
    from rk_export.testing import assert_parity

_HOME = {
    "analyze": "rk_export.commands.analyze",
    "CompressOptions": "rk_export.options.compress",
    "EvalText": "rk_export.evaluation.measure",
    "Plan": "rk_export.plan",
    "QuantSpec": "rk_export.options.compress",
    "RankRule": "rk_export.options.compress",
    "SpeedTest": "rk_export.evaluation.measure",
    "RkExportError": "rk_export.errors",
    "assert_parity": "rk_export.testing",
    "compress": "rk_export.commands.pipeline",
    "dry_run": "rk_export.commands.pipeline",
    "evaluate": "rk_export.commands.pipeline",
    "export": "rk_export.commands.pipeline",
    "make_plan": "rk_export.commands.pipeline",
    "verify": "rk_export.commands.pipeline",
}

__all__ = [
    "CompressOptions",
    "EvalText",
    "Plan",
    "QuantSpec",
    "RankRule",
    "RkExportError",
    "SpeedTest",
    "analyze",
    "assert_parity",
    "compress",
    "dry_run",
    "evaluate",
    "export",
    "make_plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
