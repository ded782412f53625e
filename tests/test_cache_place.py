"""Where costly results are kept is a matter of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CODE = """
from rk_export import tensor_cache
from rk_export.source.gguf import convert
print(tensor_cache.CACHE, convert.CACHE)
"""


@pytest.mark.parametrize(("value", "root"), [("", "~/.cache/rk-export"), ("elsewhere", "elsewhere")])
def test_the_environment_names_the_cache(value: str, root: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "RK_EXPORT_CACHE": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [root, str(Path(root) / "gguf")]
