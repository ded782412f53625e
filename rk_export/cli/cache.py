"""The command `cache`: what costly results are kept, and what goes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from rk_export.cli.terminal import print_json, show
from rk_export.errors import InputError

_WITH_PRUNE = ("to", "older_than", "kind", "all", "dry_run")


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cache`."""
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove what was not used for the longest time, down to the limit",
    )
    parser.add_argument("--to", metavar="SIZE", help="prune until so much is left: 5GB")
    parser.add_argument(
        "--older-than", type=float, metavar="DAYS", help="prune what was not used for so many days"
    )
    parser.add_argument("--kind", help="prune only this kind, and all of it unless a size or an age is given")
    parser.add_argument("--all", action="store_true", help="prune everything that no run uses now")
    parser.add_argument("--dry-run", action="store_true", help="show what would be pruned; remove nothing")


def add_cache_limit(parser: argparse.ArgumentParser) -> None:
    """Add the limit to a command that writes to the cache."""
    parser.add_argument(
        "--cache-limit",
        metavar="SIZE",
        help="what the cache may hold: 20GB (default: RK_EXPORT_CACHE_LIMIT, else 20GB or a tenth of the disk)",
    )


def run_cache(args: argparse.Namespace) -> int:
    """`cache`: a table, or what was removed."""
    from rk_export.commands.cache import cache_contents, prune_cache

    if not args.prune:
        for name in _WITH_PRUNE:
            if getattr(args, name) not in (None, False):
                where = f"--{name.replace('_', '-')}"
                raise InputError("goes with --prune", where=where, fix="add --prune, or drop it")
        contents = cache_contents()
        print_json(contents.to_json()) if args.json else show(*contents.blocks())
        return 0
    pruned = prune_cache(
        to=args.to,
        older_than=args.older_than,
        kind=args.kind,
        everything=args.all,
        dry_run=args.dry_run,
    )
    print_json(pruned.to_json()) if args.json else show(*pruned.blocks())
    return 0


@contextmanager
def cache_limited(args: argparse.Namespace) -> Iterator[None]:
    """Hold the cache to what the command line or the environment says while the context lasts.

    Raises:
        InputError: That is no size. It is said now, not after the work.
    """
    from rk_export.cache_limit import chosen_limit

    with chosen_limit(getattr(args, "cache_limit", None)):
        yield
