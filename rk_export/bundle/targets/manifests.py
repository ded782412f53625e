"""How manifests are written: a comment for whoever applies them, and the object as YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def write_object(path: Path, comment: Sequence[str], value: Mapping[str, Any]) -> None:
    """Write one object of a cluster.

    Args:
        path: The file.
        comment: What stands before it, a line each.
        value: The object.
    """
    head = "".join(f"# {line}\n" for line in comment)
    text = yaml.dump(dict(value), Dumper=_Plain, sort_keys=False, width=1000)
    path.write_text(head + text, encoding="utf-8")


class _Plain(yaml.SafeDumper):
    """Writes every part out: two uses of one object would become an anchor and an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        """Whether a second use is written out; always."""
        return True
