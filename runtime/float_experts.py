"""Mixtures of 8-bit experts that read float inputs: their operator asks the environment, not its accuracy level."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# `com.microsoft.QMoE` reads it while a session is made. At `fp32` experts of 8 bits are made floats and multiplied,
# one by one; otherwise they round their inputs to int8 whatever the accuracy level is.
_VARIABLE, _FLOATS = "ORT_QMOE_CPU_QNBIT_GEMM", "fp32"
_LOCK = threading.Lock()


@contextmanager
def float_experts() -> Iterator[None]:
    """Let the experts of sessions that are made inside read floats, those of 4 bits at their own accuracy level too."""
    with _LOCK:
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = _FLOATS
        try:
            yield
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before
