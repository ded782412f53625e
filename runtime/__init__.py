"""Run exported bundles on ONNX Runtime; imports neither torch nor transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rk_export.runtime.benchmark import BenchResult, bench
    from rk_export.runtime.contestants import BundleContestant, Contestant, GenAIContestant
    from rk_export.runtime.encoder import EncoderSession
    from rk_export.runtime.options import FinishReason, Generation, GenerationOptions
    from rk_export.runtime.session import Session
    from rk_export.runtime.text_encoder import Classified, Encoder, TaggedToken

# No file may have the name of a public object: importing it would put the module in the object's place.
_HOME = {
    "BenchResult": "benchmark",
    "BundleContestant": "contestants",
    "Classified": "text_encoder",
    "Contestant": "contestants",
    "Encoder": "text_encoder",
    "EncoderSession": "encoder",
    "FinishReason": "options",
    "GenAIContestant": "contestants",
    "Generation": "options",
    "GenerationOptions": "options",
    "Session": "session",
    "TaggedToken": "text_encoder",
    "bench": "benchmark",
}

__all__ = [
    "BenchResult",
    "BundleContestant",
    "Classified",
    "Contestant",
    "Encoder",
    "EncoderSession",
    "FinishReason",
    "GenAIContestant",
    "Generation",
    "GenerationOptions",
    "Session",
    "TaggedToken",
    "bench",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
