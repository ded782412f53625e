"""Command-line arguments of the published systems and of structured pruning, and the options that they make."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rk_export.errors import InputError

if TYPE_CHECKING:
    from rk_export.options.compress import Budget, CompressOptions, RankRule
    from rk_export.options.methods import PruneOptions

# Argument -> the methods that read it.
_READ_BY = {
    "target": ("basel",),
    "new_basis": ("basel",),
    "importance": ("basel",),
    "bases": ("basel",),
    "tune": ("basel",),
    "selector": ("cap",),
    "steps": ("basel", "cap"),
}


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a published system, its own settings, and structured pruning."""
    parser.add_argument(
        "--method",
        help="a published system as it stands: joint-rank (2402.16319), basel (2405.15877, needs --target) or cap "
        "(2505.03801); floats unless --bits is given",
    )
    parser.add_argument("--target", metavar="FILE", help="basel: text of the task, UTF-8")
    parser.add_argument(
        "--steps", type=int, help="basel, cap: steps of training or search (default 200, 100)"
    )
    parser.add_argument("--new-basis", type=int, help="basel: rank of the new bases (default 32)")
    parser.add_argument(
        "--importance", help="basel: magnitude, gradient or second-order (default magnitude, the paper's)"
    )
    parser.add_argument(
        "--bases", help="basel: plain directions (default, the paper's) or whitened by the task's inputs"
    )
    parser.add_argument("--tune", type=int, help="basel: steps that train the factors afterwards (default 0)")
    parser.add_argument(
        "--selector", help="cap: policy (default, the paper's), pools, auction, wanda or magnitude"
    )
    parser.add_argument("--prune-blocks", type=int, help="drop so many blocks, those that change least")
    parser.add_argument("--prune-ffn", type=float, help="share of every MLP's neurons to keep")
    parser.add_argument("--prune-heads", type=int, help="key/value heads of every block to keep")


def preset(args: argparse.Namespace, rank: RankRule | None, budget: Budget | None) -> CompressOptions | None:
    """Return the options of the method that was named, or None where none was.

    Raises:
        InputError: If the method is unknown or lacks what it needs, or an argument belongs to another.
    """
    from rk_export.options import presets
    from rk_export.options.methods import BaselOptions, CapOptions

    method = getattr(args, "method", None)
    if method not in (None, *presets.METHODS):
        raise InputError(
            f"unknown method {method!r}", where="--method", fix=f"choose {', '.join(presets.METHODS)}"
        )
    for name, readers in _READ_BY.items():
        if getattr(args, name, None) is not None and method not in readers:
            raise InputError(
                f"goes with --method {' or '.join(readers)}",
                where=f"--{name.replace('_', '-')}",
                fix="name the method, or drop it",
            )
    if method is None:
        return None
    if method == "cap":
        if budget is None:
            raise InputError("cap spends a budget", where="--method", fix="give --keep SHARE or --size BYTES")
        return presets.cap(budget, CapOptions(**_given(args, "selector", "steps")))
    if rank is None:
        needed = "--keep SHARE or --energy SHARE" + (", or --rank K" if method == "joint-rank" else "")
        raise InputError(f"{method} needs to know how much stays", where="--method", fix=f"give {needed}")
    if method == "joint-rank":
        return presets.joint_rank(rank)
    if args.target is None:
        raise InputError("basel trains for a task", where="--method", fix="give its text with --target FILE")
    fields = _given(args, "target", "steps", "new_basis", "importance", "bases", "tune")
    if args.seed is not None:
        fields["seed"] = args.seed
    return presets.basel(rank, BaselOptions(**fields))


def prune_options(args: argparse.Namespace) -> PruneOptions | None:
    """Return what whole structures are to go, or None where none was named."""
    from rk_export.options.methods import PruneOptions

    names = {"prune_blocks": "blocks", "prune_ffn": "ffn", "prune_heads": "kv_groups"}
    given = {
        field: getattr(args, name) for name, field in names.items() if getattr(args, name, None) is not None
    }
    return PruneOptions(**given) if given else None


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
