"""What clients call the bundles of a server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rk_export.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # it stands in paths


def named_folders(folders: Sequence[Path], names: Sequence[str]) -> dict[str, Path]:
    """Return the bundles by name: that of the folder, or the one given for it.

    Args:
        folders: The bundles.
        names: ``NAME`` for the only bundle, or ``NAME=FOLDER`` with the folder as it was given.

    Raises:
        InputError: A name belongs to no bundle, or two bundles have the same.
    """
    given: dict[Path, str] = {}
    for text in names:
        name, equals, path = text.partition("=")
        place = Path(path) if equals else folders[0]
        if not name or place not in folders or (not equals and len(folders) > 1):
            raise InputError(f"{text!r} names no bundle of the line", where="name", fix="write NAME=FOLDER")
        given[place] = name
    found: dict[str, Path] = {}
    for folder in folders:
        name = given.get(folder, folder.resolve().name)
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{name!r} is no name of a model",
                where=str(folder),
                fix="give --name NAME=FOLDER of letters, digits, dots, colons, dashes and underscores",
            )
        if name in found:
            raise InputError(
                f"two bundles are named {name!r}", where=str(folder), fix="give --name OTHER=FOLDER"
            )
        found[name] = folder
    return found
