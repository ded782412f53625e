"""The command `sign`: a detached signature of a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from rk_export.cli.terminal import print_json


def add_sign_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sign`."""
    parser.add_argument("bundle", type=Path, help="a bundle that compress or export wrote")
    parser.add_argument(
        "--key",
        type=Path,
        required=True,
        metavar="FILE",
        help="Ed25519 private key in PEM form: openssl genpkey -algorithm ed25519",
    )


def run_sign(args: argparse.Namespace) -> int:
    """`sign`: check every file, and sign the manifest."""
    from rk_export.signature import sign_bundle

    written = sign_bundle(args.bundle, args.key)
    print_json({"signature": str(written)}) if args.json else print(f"signature  {written}")
    return 0
