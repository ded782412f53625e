"""The reference page of recipes is what the code says."""

from __future__ import annotations

import os

from recipes_page import PAGE, page


def test_the_page_is_written_from_the_code() -> None:
    if os.environ.get("RK_UPDATE_DOCS"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()
