"""Command-line arguments of the methods, from the fields of their options, and the options that they make."""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any

from rk_export.errors import InputError
from rk_export.methods import METHODS
from rk_export.options.method import MethodOptions, flags_of

if TYPE_CHECKING:
    from rk_export.options.ranks import Budget, RankRule
    from rk_export.options.recipe import Recipe

NAMED = {kind.name: kind for kind in METHODS if kind.by_name}


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a published system, and the settings of every method."""
    parser.add_argument(
        "--method",
        help=f"a published system as it stands: {', '.join(NAMED)}; floats unless --bits is given",
    )
    for flag, readers in _readers().items():
        said = [_help(kind, item) for kind, item in readers]
        item = readers[0][1]
        parser.add_argument(
            flag,
            dest=_place(item),
            metavar=item.metadata["metavar"],
            type=_number(item),
            help="; ".join(said),
        )


def _readers() -> dict[str, list[tuple[type[MethodOptions], Field[Any]]]]:
    """Return which methods read each flag."""
    readers = defaultdict(list)
    for kind in METHODS:
        for item in flags_of(kind):
            readers[item.metadata["flag"]].append((kind, item))
    return readers


def _help(kind: type[MethodOptions], item: Field[Any]) -> str:
    said = str(item.metadata["help"])
    return f"{kind.name}: {said}" if kind.by_name else said


def _number(item: Field[Any]) -> Any:
    """Return the type that argparse reads a flag as; texts are opened later."""
    read = item.metadata["read"]
    return read if read in (int, float) else str


def _place(item: Field[Any]) -> str:
    return str(item.metadata["flag"]).removeprefix("--").replace("-", "_")


def methods(args: argparse.Namespace) -> tuple[MethodOptions, ...]:
    """Return the methods that were asked for by flags of their own, in the order in which they work."""
    asked = (_made(kind, args) for kind in METHODS if not kind.by_name)
    return tuple(method for method in asked if method is not None)


def named_recipe(args: argparse.Namespace, rank: RankRule | None, budget: Budget | None) -> Recipe | None:
    """Return the options of the method that was named, or None where none was.

    Raises:
        InputError: If the method is unknown or lacks what it needs, or an argument belongs to another.
    """
    name = getattr(args, "method", None)
    if name is not None and name not in NAMED:
        raise InputError(f"unknown method {name!r}", where="--method", fix=f"choose {', '.join(NAMED)}")
    _refuse_foreign(args, name)
    if name is None:
        return None
    kind = NAMED[name]
    amount = rank if kind.amount == "rank rule" else budget
    if amount is None:
        raise InputError(
            f"{name} needs to know how much stays", where="--method", fix=f"give {kind.needed()}"
        )
    method = _made(kind, args, always=True)
    return None if method is None else method.recipe(amount)


def takes_rank_rule(args: argparse.Namespace) -> bool:
    """Whether the method that was named takes --keep as the same share everywhere, not as a budget."""
    kind = NAMED.get(getattr(args, "method", None) or "")
    return kind is not None and kind.amount == "rank rule"


def _refuse_foreign(args: argparse.Namespace, name: str | None) -> None:
    """Refuse flags that only methods read which were not named."""
    for flag, readers in _readers().items():
        kinds = [kind for kind, _ in readers]
        given = getattr(args, _place(readers[0][1]), None) is not None
        if given and all(kind.by_name for kind in kinds) and name not in [kind.name for kind in kinds]:
            raise InputError(
                f"goes with --method {' or '.join(kind.name for kind in kinds)}",
                where=flag,
                fix="name the method, or drop it",
            )


def _made(kind: type[MethodOptions], args: argparse.Namespace, always: bool = False) -> MethodOptions | None:
    """Return a method's options from its flags, or None where not one was given."""
    given = {}
    for item in flags_of(kind):
        if (value := getattr(args, _place(item), None)) is not None:
            read = item.metadata["read"]
            given[item.name] = read(value) if read is not None else value
    if not given and not always:
        return None
    for item in flags_of(kind):
        if item.default is MISSING and item.name not in given:
            raise InputError(
                f"{kind.name} needs the {item.metadata['help']}",
                where="--method",
                fix=f"give {item.metadata['flag']} {item.metadata['metavar'] or item.name.upper()}",
            )
    if getattr(args, "seed", None) is not None and any(item.name == "seed" for item in fields(kind)):
        given["seed"] = args.seed
    return kind(**given)
