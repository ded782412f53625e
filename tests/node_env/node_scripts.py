"""Runs the scripts of this folder with Node.js."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def node(script: str, **job: Any) -> Any:
    """Give a script its job as JSON and return its answer, the last line that it prints."""
    done = subprocess.run(
        ["node", str(HERE / script)], input=json.dumps(job), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
