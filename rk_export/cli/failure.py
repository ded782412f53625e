"""How a command that fails says so: words for people, or one line of JSON for programs.

Errors go to standard error in both forms, and standard output stays empty: what reads the results of `--json` never
has to tell a result from an error, and the exit status says which of the two it is. The line of JSON is the last one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import NoReturn

from rk_export.errors import InputError, RkExportError


class UsageError(InputError):
    """The command line cannot be parsed.

    Args:
        message: What argparse says of it.
        parser: The parser that refused it.
    """

    def __init__(self, message: str, parser: argparse.ArgumentParser) -> None:
        super().__init__(message, where=parser.prog, fix=f"see {parser.prog} --help")
        self.usage = parser.format_usage()


class Parser(argparse.ArgumentParser):
    """A parser that leaves it to `main` how an error is told."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line.

        Raises:
            UsageError: Always.
        """
        raise UsageError(message, self)


def tell(error: RkExportError, *, as_json: bool) -> int:
    """Print an error on standard error; return the exit status that belongs to it."""
    if as_json:
        fields = {"what": error.what, "where": error.where, "fix": error.fix}
        tell_json(type(error).__name__, error.exit_code, fields)
    elif isinstance(error, UsageError):
        print(f"{error.usage}{error.where}: error: {error.what}", file=sys.stderr)
    else:
        print(f"rk-export: error: {error}", file=sys.stderr)
    return error.exit_code


def tell_json(kind: str, exit_code: int, fields: Mapping[str, object]) -> None:
    """Print an error as one line of JSON on standard error."""
    error = {"kind": kind, "exit_code": exit_code, **fields}
    print(json.dumps({"error": error}, ensure_ascii=False), file=sys.stderr)
