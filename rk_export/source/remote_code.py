"""Python code that comes with a checkpoint: found in the files that name it, and refused. It is never run.

transformers imports such code when a file names it, unless ``trust_remote_code`` is False. Where transformers has a
class of its own for the model type, it then takes that one and says nothing, although the two may compute different
things. So a folder that names code is refused: the user, who can read the code, decides.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from rk_export.errors import InputError
from rk_export.json_codec import load_json

CUSTOM_GENERATE = "custom_generate/generate.py"

_KERNEL_ENTRY = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_HUB_KERNEL = re.compile(r"[^/]+/.+")  # org/name, perhaps with a revision and a function


@dataclass(frozen=True)
class CodeReference:
    """An entry of a checkpoint's file that names code.

    Args:
        file: The file.
        entry: Path of the entry in the file's JSON object, with dots; None where the file is the code.
        code: What it names, each with where that lies.
    """

    file: Path
    entry: str | None
    code: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file.name}{f', {self.entry}' if self.entry else ''}: {', '.join(self.code)}"


def refuse_remote_code(folder: Path) -> None:
    """Refuse a model folder whose files name code.

    Args:
        folder: A Hugging Face folder.

    Raises:
        InputError: A configuration file names Python code or a kernel of the hub, or the folder brings a function that
            replaces ``generate``.
    """
    found = list(code_references(folder))
    if found:
        raise InputError(
            "names code that comes with the checkpoint; such code can do anything on this machine and is never run "
            f"({'; '.join(map(str, found))})",
            where=str(found[0].file),
            fix=_fix(folder, found),
        )


def code_references(folder: Path) -> Iterator[CodeReference]:
    """Yield every entry of a model folder's files that names code, those of ``config.json`` first.

    A file that holds no JSON object names nothing; whoever needs the file reports it.
    """
    files = sorted(folder.glob("*config*.json"), key=lambda path: (path.name != "config.json", path.name))
    for file in files:
        for entry, value in _entries(_read(file)):
            name = entry.rpartition(".")[-1]
            if name == "auto_map" and value != {}:  # what is no object names code too, or breaks transformers
                yield CodeReference(file, entry, tuple(_located(folder, one) for one in _leaves(value)))
            elif _KERNEL_ENTRY.fullmatch(name):
                kernels = [
                    one for one in _leaves(value) if isinstance(one, str) and _HUB_KERNEL.fullmatch(one)
                ]
                if kernels:
                    yield CodeReference(file, entry, tuple(f"{one} on the hub" for one in kernels))
    if (folder / CUSTOM_GENERATE).is_file():
        yield CodeReference(folder / CUSTOM_GENERATE, None, ("it replaces generate",))


def _read(file: Path) -> Any:
    try:
        return load_json(file, fix="")
    except InputError:
        return None


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of each entry of an object and of the objects inside it."""
    waiting = deque([("", value)])
    while waiting:
        prefix, node = waiting.popleft()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, item in items:
            yield f"{prefix}{key}", item
            waiting.append((f"{prefix}{key}.", item))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what an entry names, without duplicates: classes come in objects, and in lists of a slow and a fast one."""
    inside = (
        [value] if not isinstance(value, (dict, list)) or not value else [item for _, item in _entries(value)]
    )
    named = [item for item in inside if not isinstance(item, (dict, list)) or not item]
    yield from dict.fromkeys(one if isinstance(one, str) else json.dumps(one) for one in named)


def _located(folder: Path, reference: str) -> str:
    """Return a reference like ``modeling_x.XModel`` or ``org/name--modeling_x.XModel`` with where its code lies."""
    repository, _, inside = reference.rpartition("--")
    module, _, _ = inside.rpartition(".")
    if repository:
        return f"{inside} of {repository} on the hub"
    return f"{inside} in {module}.py" if module and (folder / f"{module}.py").is_file() else inside


def _fix(folder: Path, found: list[CodeReference]) -> str:
    config = _read(folder / "config.json")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return (
            f"use another checkpoint: transformers has no class of its own for the model type {model_type!r}, so "
            "nothing but that code can compute it"
        )
    entries = [f"{one.entry} from {one.file.name}" if one.entry else f"{CUSTOM_GENERATE}" for one in found]
    return (
        f"if transformers' own class for {model_type!r} computes the same as that code, delete "
        f"{' and '.join(entries)} in a copy of the folder and use the copy"
    )
