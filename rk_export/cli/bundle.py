"""The command `bundle`: deployment files made from a finished bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from rk_export.cli.terminal import print_json, show
from rk_export.errors import InputError


def add_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bundle`."""
    parser.add_argument("bundle", type=Path, nargs="?", help="a bundle that compress or export wrote")
    parser.add_argument(
        "--for", dest="targets", metavar="TARGETS", help="targets, e.g. triton,kserve; --list shows them all"
    )
    parser.add_argument("--list", action="store_true", help="show the targets and stop")
    parser.add_argument("--name", help="name of the served model (default: the folder's)")
    parser.add_argument(
        "--storage",
        metavar="URI",
        help="kserve, kserve-triton, kubernetes: where the cluster finds the bundle (default: pvc://models/NAME)",
    )
    parser.add_argument(
        "--image",
        help="kserve, kubernetes: container image that runs rk-export serve (default: rk-export:VERSION)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace deployment files that are there already"
    )


def run_bundle(args: argparse.Namespace) -> int:
    """`bundle`: write the files of each target, or list the targets."""
    if args.list:
        return _list_targets(args.json)
    if args.bundle is None or args.targets is None:
        raise InputError(
            "a bundle and its targets are needed",
            where="bundle",
            fix="rk-export bundle FOLDER --for triton, or --list to see the targets",
        )
    from rk_export.commands.deployment_files import deployment_files

    names = [name for name in args.targets.split(",") if name]
    places = deployment_files(
        args.bundle, names, name=args.name, storage=args.storage, image=args.image, force=args.force
    )
    if args.json:
        print_json({place.name: str(place) for place in places})
        return 0
    width = max(len(place.name) for place in places)
    print("\n".join(f"{place.name.ljust(width)}  {place}" for place in places))
    return 0


def _list_targets(as_json: bool) -> int:
    from rk_export.bundle.targets import TARGETS
    from rk_export.report.table import Column, make_table

    if as_json:
        print_json({target.name: target.what for target in TARGETS})
        return 0
    columns = (Column("target", "name"), Column("what is written"))
    show(make_table(columns, [(target.name, target.what) for target in TARGETS]))
    return 0
