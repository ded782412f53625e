"""Tiny models on disk, written once a session and shared by the tests of passes and of the export stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compressed import SourceOf
from tiny_models import tiny_model

from rk_export.load import ModelSource, open_source


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> SourceOf:
    """Return a function from family and config fields to the saved tiny model; equal arguments share one."""
    sources: dict[str, ModelSource] = {}

    def source(family: str, **overrides: Any) -> ModelSource:
        key = repr((family, sorted(overrides.items())))
        if key not in sources:
            folder: Path = tmp_path_factory.mktemp(family)
            tiny_model(family, **overrides).save_pretrained(folder)
            sources[key] = open_source(folder)
        return sources[key]

    return source
