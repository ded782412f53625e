"""What a deployment target is: a name, a sentence, and a function that writes its files from a finished bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Deployment:
    """A finished bundle, and how it is to be served.

    Args:
        bundle: The bundle folder.
        name: Name of the served model.
        ep: Execution provider of the server.
        storage: Where the cluster finds what is served; None leaves the target's own default.
        image: Container image of the server; None leaves the target's own default.
    """

    bundle: Path
    name: str
    ep: Literal["cpu", "cuda"] = "cpu"
    storage: str | None = None
    image: str | None = None


@dataclass(frozen=True)
class Target:
    """One place to deploy to.

    Args:
        name: What ``--for`` calls it; its files lie in the bundle's folder of that name.
        what: What is written, in one sentence.
        write: Writes the files into an empty folder; it raises InputError where the bundle cannot be served there.
        needs: Targets whose files these files refer to; they are written too.
        takes: Options of a deployment, beside the name, that make a difference here: ``storage``, ``image``.
    """

    name: str
    what: str
    write: Callable[[Deployment, Path], None]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
