"""Where the tests of real models get them: the one place that names who fetches."""

from __future__ import annotations

from assets import smollm2, wiki_text

__all__ = ["smollm2", "wiki_text"]
