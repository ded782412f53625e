"""Methods, a folder for each; a method is added by its folder and its line below.

A folder holds `options.py`, what may be asked for, which is light to import. Where the method does more than set other
options, it also holds `method.py` with a subclass of `rk_export.methods.base.Method`, named `METHOD`.
"""

from __future__ import annotations

from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.heal.options import HealOptions
from rk_export.methods.prune.options import PruneOptions
from rk_export.methods.sslc.options import SslcOptions
from rk_export.options.step import MethodOptions

METHODS: tuple[type[MethodOptions], ...] = (
    PruneOptions,
    BaselOptions,
    CapOptions,
    SslcOptions,
    HealOptions,
)
