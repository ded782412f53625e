"""The runtime in the server's environment, which has none of the packages that compress and export."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("pytriton", reason="needs nvidia-pytriton: run `make test-triton`")

ABSENT = ("torch", "transformers", "yaml", "scipy", "safetensors", "onnx_ir", "pydantic")
CODE = f"""
import sys
for name in {ABSENT}: sys.modules[name] = None
import numpy
import rk_export.runtime.triton.model
from rk_export.runtime import EncoderSession, Session, bench
from rk_export.runtime.engine import Engine
assert int(numpy.__version__.split('.')[0]) < 2, numpy.__version__
"""


def test_the_runtime_imports_without_what_only_the_export_needs() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
