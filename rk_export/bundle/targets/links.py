"""Files of a bundle that appear a second time, in the folder of a deployment target."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)


def link_or_copy(source: Path, target: Path) -> None:
    """Let a file appear a second time: as a hard link, or as a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # files of the Hub's cache are links themselves
    except OSError as error:
        logger.info("%s: copied, hard links do not work here (%s)", target.name, error.strerror)
        shutil.copyfile(source, target)
