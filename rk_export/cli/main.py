"""Command line: parses, calls the API with the same names, prints. Nothing else."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rk_export.cli.parser import Command, build_parser
from rk_export.cli.terminal import work_shown
from rk_export.errors import InputError, RkExportError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 (parity or check failed) or 2 (bad input)."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    return run_command(args.run, args, ["rk-export", *words])


def run_command(command: Command, args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run a command with logs and progress on stderr and our errors as messages; return the exit status.

    Args:
        command: One of the `run_...` functions.
        args: Its parsed arguments.
        words: The command line, which reports repeat.
    """
    args.command_line = shlex.join(map(_without_folders, words))
    quiet_libraries()
    try:
        with work_shown(bars=not getattr(args, "json", False)):
            return command(args)
    except RkExportError as error:
        print(f"rk-export: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("rk-export: interrupted; outputs are as they were", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:  # a file that may not be read, a name that is too long, a disk that fails
        if error.filename is None:
            raise
        problem = InputError(
            str(error.strerror), where=str(error.filename), fix="check the path and your rights to it"
        )
        print(f"rk-export: error: {problem}", file=sys.stderr)
        return problem.exit_code


def _without_folders(word: str) -> str:
    """Return a word of the command line with absolute paths by their names: reports travel with bundles."""
    parts = re.split(r"([:=])", word)
    return "".join(Path(part).name if part.startswith(("/", "~")) else part for part in parts)


def quiet_libraries() -> None:
    """Leave the terminal to our own lines."""
    for name in (
        "httpx",
        "mobius",
        "onnxscript",
        "onnx_ir",
        "onnx_shape_inference",
        "matplotlib",
        "fontTools",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
