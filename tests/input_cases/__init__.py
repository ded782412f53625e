"""Inputs as people bring them, each with what should become of it; `measure_inputs.py` runs them all."""

from __future__ import annotations

from input_cases import adapters, files, gguf_sources, quantized, texts, wrappers
from input_cases.case import Case

CASES: tuple[Case, ...] = (
    *files.CASES,
    *wrappers.CASES,
    *adapters.CASES,
    *quantized.CASES,
    *gguf_sources.CASES,
    *texts.CASES,
)
