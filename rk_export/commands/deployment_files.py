"""Deployment files made from any finished bundle."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from rk_export.atomic import beside, synchronize, synchronize_tree
from rk_export.bundle.targets import TARGETS
from rk_export.bundle.targets.base import Deployment, Target
from rk_export.errors import InputError
from rk_export.manifest import check_manifest, replace_in_manifest

_BY_NAME = {target.name: target for target in TARGETS}


def deployment_files(
    bundle: str | Path,
    targets: Sequence[str],
    *,
    name: str | None = None,
    storage: str | None = None,
    image: str | None = None,
    force: bool = False,
) -> tuple[Path, ...]:
    """Add the files that deployment targets need to a finished bundle; its manifest lists them too.

    Args:
        bundle: A bundle folder; every checksum is compared before anything is written.
        targets: Names of targets, e.g. ``triton``; a target that refers to another one brings it along.
        name: Name of the served model; None takes the folder's.
        storage: Where a cluster will find the bundle, for ``kserve`` and the like.
        image: Container image that runs ``rk-export serve``, for ``kserve`` and ``kubernetes``.
        force: Replace files that an earlier call wrote.

    Returns:
        The folder of each target, e.g. ``{bundle}/triton``.

    Raises:
        InputError: The folder is no bundle or was changed, a target or a name cannot be used, or files are there
            already.
    """
    folder = Path(bundle).expanduser().resolve()
    wanted = _with_needed(targets)
    for option, value in {"storage": storage, "image": image}.items():
        if value is not None:
            _check_taken(option, wanted)
    manifest = check_manifest(folder)
    ep: Literal["cpu", "cuda"] = "cuda" if manifest.get("ep") == "cuda" else "cpu"
    deployment = Deployment(folder, _checked(name or folder.name), ep, storage, image)
    # What is there under the same name already serves a target that only refers to it.
    wanted = [
        one for one in wanted if one.name in targets or not (folder / one.name / deployment.name).exists()
    ]
    places = [folder / target.name for target in wanted]
    for place in places:
        if place.exists() and not force:
            raise InputError("exists already", where=str(place), fix="add --force to replace it")
    partial = beside(folder, "partial")
    try:
        for target in wanted:
            (partial / target.name).mkdir(parents=True)
            target.write(deployment, partial / target.name)
        synchronize_tree(partial)
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
            (partial / place.name).rename(place)
        synchronize(folder)
        replace_in_manifest(folder, [place.name for place in places])
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return tuple(places)


def _check_taken(option: str, targets: Sequence[Target]) -> None:
    if any(option in target.takes for target in targets):
        return
    takers = ", ".join(target.name for target in TARGETS if option in target.takes)
    raise InputError(
        f"goes with {takers}",
        where=f"--{option}",
        fix="add one of these targets to --for, or drop the option",
    )


def _with_needed(names: Sequence[str]) -> list[Target]:
    """Return the targets in the order in which they are written, each once."""
    if not names:
        raise InputError("no target is named", where="--for", fix=f"give some of {', '.join(_BY_NAME)}")
    for name in names:
        if name not in _BY_NAME:
            raise InputError(
                f"{name!r} is no deployment target", where="--for", fix=f"give some of {', '.join(_BY_NAME)}"
            )
    return list(dict.fromkeys(target for name in names for target in _expanded(name)))


def _expanded(name: str) -> Iterator[Target]:
    for needed in _BY_NAME[name].needs:
        yield from _expanded(needed)
    yield _BY_NAME[name]


def _checked(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(
            f"{name!r} cannot name a served model",
            where="--name",
            fix="use letters, digits, '_', '-' and '.'",
        )
    return name
