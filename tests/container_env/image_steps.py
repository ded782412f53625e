"""Carries out a Containerfile without a container engine: the same files are copied, the same commands run.

Paths inside the image lie below one folder of this machine. Only what our Containerfile uses is known.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One stage: where it stands, and what it has set.

    Args:
        root: The folder that stands for ``/``.
        place: The working directory in the image.
        variables: ``ARG`` and ``ENV``.
        settings: The last ``USER``, ``ENTRYPOINT``, ``CMD`` ... in its words.
    """

    root: Path
    place: str = "/"
    variables: dict[str, str] = field(default_factory=dict)
    settings: dict[str, list[str]] = field(default_factory=dict)

    def here(self, path: str) -> Path:
        """Return where a path of the image lies on this machine."""
        return self.root / os.path.join(self.place, path).lstrip("/")

    def moved(self, text: str) -> str:
        """Return a text with the image's own folders where they lie on this machine."""
        return re.sub(r"/(?=opt/|bundle\b|source\b)", f"{self.root}/", text)


def instructions(file: Path) -> list[tuple[str, str]]:
    """Return instructions and their arguments, comments dropped and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line]


def build(file: Path, context: Path, root: Path, environment: dict[str, str], **arguments: str) -> Stage:
    """Carry out every stage in one root and return the last one.

    Args:
        file: The Containerfile.
        context: The folder that it copies from.
        root: An empty folder.
        environment: Of the commands.
        arguments: Values of ``ARG``.
    """
    stage = Stage(root)
    for word, rest in instructions(file):
        if word == "FROM":
            stage = Stage(root)
        elif word == "ARG":
            name, _, default = rest.partition("=")
            stage.variables[name] = arguments.get(name, default)
        elif word == "ENV":
            stage.variables |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "WORKDIR":
            stage.place = rest
            stage.here(".").mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            _copy(stage, context, shlex.split(rest))
        elif word == "RUN":
            command = ["sh", "-ec", stage.moved(rest)]
            subprocess.run(command, cwd=stage.here("."), env=environment | stage.variables, check=True)
        elif word in ("USER", "EXPOSE", "LABEL"):
            stage.settings[word] = shlex.split(rest)
        elif word in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
            stage.settings[word] = [stage.moved(part) for part in json.loads(rest[rest.index("[") :])]
        else:
            raise ValueError(f"{word} is not known here")
    return stage


def _copy(stage: Stage, context: Path, words: list[str]) -> None:
    if words[0].startswith("--from="):
        assert words[1] == words[2], "all stages share one root"
        assert stage.here(words[1]).is_dir()
        return
    *sources, target = words
    found = [path for source in sources for path in sorted(context.glob(source))]
    assert found
    for path in found:
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, stage.here(target), symlinks=True, ignore=ignored)
        else:
            place = stage.here(target) / path.name if target.endswith("/") else stage.here(target)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
