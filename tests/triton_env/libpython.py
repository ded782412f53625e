"""Makes sure that the shared library of this Python is there, which Triton's Python backend is linked against.

As a program, it installs Debian's package where it is missing and this user may.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBRARY = f"libpython{VERSION}.so.1.0"
PACKAGE = f"libpython{VERSION}"


def library_folder() -> Path | None:
    """Return the folder of this Python's own shared library, or None where it has none."""
    folder = Path(sysconfig.get_config_var("LIBDIR") or "")
    return folder if (folder / LIBRARY).is_file() else None


def is_there() -> bool:
    """Whether the library is this Python's own, or is found by the system."""
    if library_folder() is not None:
        return True
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def main() -> str | None:
    """Return None if the library is there in the end, or else what to do."""
    if is_there():
        return None
    if shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update"], check=False)
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", PACKAGE], check=False)
        if is_there():
            return None
    return (
        f"{LIBRARY} is missing: Triton's Python backend is linked against it.\n"
        f"Fix: apt-get install {PACKAGE} as root, or give a Python built with --enable-shared: make PYTHON=..."
    )


if __name__ == "__main__":
    sys.exit(main())
