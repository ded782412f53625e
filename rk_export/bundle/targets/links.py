"""Files that a deployment target shares with its bundle: hard links, and what a graph keeps beside itself."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import onnx

from rk_export.errors import InputError

logger = logging.getLogger(__name__)


def bundle_graph(bundle: Path) -> onnx.ModelProto:
    """Return a bundle's graph without its external data.

    Raises:
        InputError: The bundle has no ``model.onnx``.
    """
    if not (bundle / "model.onnx").is_file():
        raise InputError("model.onnx is missing", where=str(bundle), fix="export the bundle again")
    return onnx.load(bundle / "model.onnx", load_external_data=False)


def data_files(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the files that hold a graph's weights, sorted."""
    entries = (entry for tensor in graph.initializer for entry in tensor.external_data)
    return sorted({entry.value for entry in entries if entry.key == "location"})


def link(source: Path, target: Path) -> None:
    """Let a file appear in a second place, as a hard link; it is copied where the file system has none."""
    try:
        os.link(source.resolve(), target)  # files of the Hub's cache are links themselves
    except OSError as error:
        logger.info("%s: copied, hard links do not work here (%s)", target.name, error.strerror)
        shutil.copyfile(source, target)
