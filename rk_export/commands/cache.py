"""Look at the cache, and remove from it."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rk_export.cache_limit import (
    ASSETS,
    CacheEntry,
    cache_bytes,
    cache_entries,
    cache_leftovers,
    cache_limit,
    is_used,
    remove_cache_leftovers,
    remove_entry,
)
from rk_export.errors import InputError
from rk_export.report.humanize import size
from rk_export.report.table import Block, Column, make_table
from rk_export.tensor_cache import cache_root, model_of

_DAY = 24 * 3600.0
_NOW = "%Y-%m-%d %H:%M"


@dataclass(frozen=True)
class Kept:
    """An entry of the cache, and the model that it belongs to as far as it says."""

    entry: CacheEntry
    model: str


@dataclass(frozen=True)
class CacheContents:
    """What the cache holds, the oldest first.

    Args:
        root: Its folder.
        limit: How many bytes it may hold.
        kept: The entries.
    """

    root: Path
    limit: int
    kept: tuple[Kept, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; times are seconds since the epoch."""
        return {
            "folder": str(self.root),
            "limit": self.limit,
            "bytes": _total(self.kept),
            "entries": _as_json(self.root, self.kept),
        }

    def blocks(self) -> tuple[Block, ...]:
        """Return what to print: a line for each kind and model, and the sums."""
        return *_table(self.kept), f"{self.root}: {size(_total(self.kept))}, limit {size(self.limit)}"


@dataclass(frozen=True)
class Pruned:
    """What was removed from the cache, or would be.

    Args:
        root: Its folder.
        removed: The entries that went.
        in_use: The entries that were to go and stay, because a process uses them.
        leftovers: What killed runs had left half-written.
        left: The bytes that remain.
        dry_run: Nothing was removed.
    """

    root: Path
    removed: tuple[Kept, ...]
    in_use: tuple[Kept, ...]
    leftovers: tuple[Path, ...]
    left: int
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; times are seconds since the epoch."""
        return {
            "folder": str(self.root),
            "dry_run": self.dry_run,
            "removed": _as_json(self.root, self.removed),
            "in_use": _as_json(self.root, self.in_use),
            "leftovers": [path.relative_to(self.root).as_posix() for path in self.leftovers],
            "freed": _total(self.removed),
            "bytes": self.left,
        }

    def blocks(self) -> tuple[Block, ...]:
        """Return what to print: a line for each kind and model that went, what stays in use, and the sums."""
        lines = [f"in use, not removed: {one.entry.kind}/{one.entry.path.name}" for one in self.in_use]
        if self.leftovers:
            lines.append(f"left half-written by killed runs: {len(self.leftovers)}")
        done = "would be removed" if self.dry_run else "removed"
        lines.append(f"{self.root}: {size(_total(self.removed))} {done}, {size(self.left)} left")
        return *_table(self.removed), "\n".join(lines)


def cache_contents(cache_dir: str | os.PathLike[str] | None = None) -> CacheContents:
    """Return what the cache holds.

    Args:
        cache_dir: Its folder; the one that `RK_EXPORT_CACHE` names when None.

    Raises:
        InputError: The limit in the environment is no size.
    """
    root = cache_root(cache_dir)
    return CacheContents(root, cache_limit(root), tuple(map(_with_model, cache_entries(root))))


def prune_cache(
    *,
    to: str | None = None,
    older_than: float | None = None,
    kind: str | None = None,
    everything: bool = False,
    dry_run: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Pruned:
    """Remove entries of the cache, those that were not used for the longest time first, and what killed runs left.

    Without a choice the cache is brought within its limit. What a running process uses stays.

    Args:
        to: Until so much is left, such as ``5GB``.
        older_than: What was not used for so many days.
        kind: Only this kind, and all of it unless `to` or `older_than` say less.
        everything: All entries.
        dry_run: Only say what would go.
        cache_dir: The cache's folder; the one that `RK_EXPORT_CACHE` names when None.

    Raises:
        InputError: A value is out of its range, choices contradict each other, or the cache has no such kind.
    """
    root = cache_root(cache_dir)
    if sum((to is not None, older_than is not None, everything)) > 1:
        raise InputError("say different things", where="--to, --older-than and --all", fix="give one of them")
    if older_than is not None and not 0 <= older_than < float("inf"):
        raise InputError(f"{older_than:g} days are no age", where="--older-than", fix="give 0 or more")
    entries = cache_entries(root)
    _check_kind(kind, everything, {entry.kind for entry in entries})
    # Downloads of the samples go only when they are named, or with everything.
    wanted = [
        entry
        for entry in entries
        if (entry.kind == kind if kind is not None else everything or entry.kind != ASSETS)
    ]
    removed, in_use = _removed(wanted, _until(root, wanted, to, older_than, kind, everything), dry_run)
    leftovers = cache_leftovers(root) if dry_run else remove_cache_leftovers(root)
    left = sum(entry.bytes for entry in entries) - _total(removed)
    return Pruned(root, tuple(removed), tuple(in_use), tuple(leftovers), left, dry_run)


def _check_kind(kind: str | None, everything: bool, kinds: set[str]) -> None:
    if kind is None:
        return
    if everything:
        raise InputError("say different things", where="--kind and --all", fix="give one of them")
    if kind not in kinds:
        known = ", ".join(sorted(kinds))
        fix = f"give one of {known}" if known else "the cache is empty"
        raise InputError(f"the cache holds no {kind!r}", where="--kind", fix=fix)


Goes = Callable[[CacheEntry, int], bool]  # an entry, and the bytes that are left with it


def _until(
    root: Path,
    wanted: Sequence[CacheEntry],
    to: str | None,
    older_than: float | None,
    kind: str | None,
    everything: bool,
) -> Goes:
    """Return what says whether an entry goes."""
    if older_than is not None:
        before = time.time() - older_than * _DAY
        return lambda entry, _: entry.used < before
    if to is None and (everything or kind is not None):
        return lambda *_: True
    limit = cache_limit(root) if to is None else cache_bytes(to, "--to")
    return lambda _, left: left > limit


def _removed(wanted: Sequence[CacheEntry], goes: Goes, dry_run: bool) -> tuple[list[Kept], list[Kept]]:
    """Remove what goes; return what went, and what is used."""
    removed, in_use = list[Kept](), list[Kept]()
    left = sum(entry.bytes for entry in wanted)
    for entry in wanted:
        if not goes(entry, left):
            continue
        kept = _with_model(entry)  # asked while it is there
        if is_used(entry) if dry_run else not remove_entry(entry):
            in_use.append(kept)
            continue
        removed.append(kept)
        left -= entry.bytes
    return removed, in_use


def _with_model(entry: CacheEntry) -> Kept:
    if entry.path.is_file():
        return Kept(entry, model_of(entry.path))
    if entry.kind == ASSETS:
        return Kept(entry, "")
    try:
        return Kept(entry, ", ".join(sorted(path.name for path in entry.path.iterdir() if path.is_dir())))
    except OSError:  # another process removes it
        return Kept(entry, "")


def _total(kept: Sequence[Kept]) -> int:
    return sum(one.entry.bytes for one in kept)


def _as_json(root: Path, kept: Sequence[Kept]) -> list[dict[str, Any]]:
    return [
        {
            "kind": one.entry.kind,
            "model": one.model or None,
            "path": one.entry.path.relative_to(root).as_posix(),
            "files": one.entry.files,
            "bytes": one.entry.bytes,
            "used": one.entry.used,
        }
        for one in kept
    ]


def _table(kept: Sequence[Kept]) -> tuple[Block, ...]:
    """Return a line for each kind and model, the largest first; no table where nothing is kept."""
    groups: defaultdict[tuple[str, str], list[CacheEntry]] = defaultdict(list)
    for one in kept:
        groups[one.entry.kind, one.model].append(one.entry)
    if not groups:
        return ()
    columns = (
        Column("kind", "name"),
        Column("model", "name"),
        Column("files", "number"),
        Column("size", "number"),
        Column("last used", "number"),
    )
    rows = sorted(groups.items(), key=lambda item: (-sum(entry.bytes for entry in item[1]), item[0]))
    return (make_table(columns, [_cells(*group, entries) for group, entries in rows]),)


def _cells(kind: str, model: str, entries: Sequence[CacheEntry]) -> tuple[str, ...]:
    used = time.localtime(max(entry.used for entry in entries))
    files, whole = (
        sum(entry.files for entry in entries),
        sum(entry.bytes for entry in entries),
    )
    return kind, model or "–", f"{files:,}", size(whole), time.strftime(_NOW, used)
