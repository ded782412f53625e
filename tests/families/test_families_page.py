"""docs/families.md is made of what was measured, and everything that is exported is on it."""

from __future__ import annotations

import os

from families_page import DATA, PAGE, page, read
from tiny_models import EVERY_MODEL, tiny_config

from rk_export.model.families.registry import FAMILIES


def test_the_page_is_made_of_the_results() -> None:
    if os.environ.get("RK_UPDATE_DOCS"):
        PAGE.write_text(page(read()), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(read())


def test_every_family_that_is_exported_is_tested() -> None:
    """Their tiny models are found by these tests, so nothing that is registered goes untested."""
    assert {tiny_config(name).model_type for name in EVERY_MODEL} == set(FAMILIES)


def test_every_model_is_measured() -> None:
    missing = [name for name in EVERY_MODEL if "parity" not in read().get(name, {})]
    assert not missing, f"run make families: {DATA.name} lacks {', '.join(missing)}"
