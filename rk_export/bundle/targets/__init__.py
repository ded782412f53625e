"""Deployment files of a finished bundle: one module a target, all of them listed here."""

from __future__ import annotations

from rk_export.bundle.targets import kserve, transformers_js, triton
from rk_export.bundle.targets.base import Target

TARGETS: tuple[Target, ...] = (triton.TARGET, kserve.TARGET, transformers_js.TARGET)
