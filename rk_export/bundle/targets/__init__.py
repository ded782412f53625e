"""Deployment files of a finished bundle: one module a target, all of them listed here."""

from __future__ import annotations

from rk_export.bundle.targets import kserve, kserve_triton, kubernetes, triton, triton_python
from rk_export.bundle.targets.base import Target

TARGETS: tuple[Target, ...] = (
    triton.TARGET,
    triton_python.TARGET,
    kserve.TARGET,
    kserve_triton.TARGET,
    kubernetes.TARGET,
)
