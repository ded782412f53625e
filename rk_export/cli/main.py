"""Command line: parses, calls the API with the same names, prints. Nothing else.

Standard output holds results only; with `--json` it is one JSON document. Log lines, bars and errors go to standard
error, the first two not with `--quiet`; `failure.py` says what errors look like.
"""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from rk_export.cli.cache import cache_limited
from rk_export.cli.failure import UsageError, tell, tell_json
from rk_export.cli.interrupt import INTERRUPTED, TERMINATED, Terminated, farewell, terminable
from rk_export.cli.parser import Command, build_parser
from rk_export.cli.terminal import work_shown
from rk_export.errors import InputError, RkExportError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 (parity or check failed), 2 (bad input), 130 (Ctrl-C) or 143 (SIGTERM)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser().parse_args(words)
    except UsageError as error:
        return tell(error, as_json="--json" in words)
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
    as_json, begin = args.json, time.time()
    try:
        with terminable(), work_shown(bars=not as_json, quiet=args.quiet), cache_limited(args):
            return command(args)
    except RkExportError as error:
        return tell(error, as_json=as_json)
    except (KeyboardInterrupt, Terminated) as ended:
        return _interrupted(ended, args, words, begin)
    except BrokenPipeError:
        return 0
    except OSError as error:  # a file that may not be read, a name that is too long, a disk that fails
        if error.filename is None:
            raise
        problem = InputError(
            str(error.strerror), where=str(error.filename), fix="check the path and your rights to it"
        )
        return tell(problem, as_json=as_json)


def _interrupted(ended: BaseException, args: argparse.Namespace, words: Sequence[str], begin: float) -> int:
    """Say in one line what is kept and how to go on; return the exit status."""
    name, code = ("terminated", TERMINATED) if isinstance(ended, Terminated) else ("interrupted", INTERRUPTED)
    kept, again = farewell(args, words, begin)
    if args.json:
        tell_json(
            name.capitalize(), code, {"what": name, "kept": kept, "fix": f"run the same again: {again}"}
        )
        return code
    left = f"kept: {'; '.join(kept)}" if kept else "nothing is kept"
    how = "to go on" if kept else "to start again"
    print(f"rk-export: {name}; {left}; outputs are as they were; {how}, run {again}", file=sys.stderr)
    return code


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
    # transformers 5 renames an argument that its older releases know by this name only.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
