"""Every family that is tested. To add one, write a `TinyFamily` into the `FAMILIES` of any module of this folder.

A new module is found by itself, so it is named nowhere else.
"""

from __future__ import annotations

import importlib
import pkgutil

from tiny_families.entry import TinyFamily


def _collected() -> dict[str, TinyFamily]:
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "entry")
    found: dict[str, TinyFamily] = {}
    for name in modules:
        for family in importlib.import_module(f"tiny_families.{name}").FAMILIES:
            assert family.name not in found, f"two families are called {family.name}"
            found[family.name] = family
    return found


TABLE: dict[str, TinyFamily] = _collected()
