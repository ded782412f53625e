"""The bytes of a bundle, to compare two runs."""

from __future__ import annotations

from pathlib import Path

# They say when they were made, and how long that took.
DATED = {"report.json", "report.html", "rk_manifest.json", "README.md"}


def contents(bundle: Path) -> dict[str, bytes]:
    """Return each file that has no date in it, by its path in the bundle."""
    return {
        str(path.relative_to(bundle)): path.read_bytes()
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.name not in DATED
    }
