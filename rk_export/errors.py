"""Errors of rk-export: each message says what is wrong, where, and how to fix it."""

from __future__ import annotations


class RkExportError(Exception):
    """Base of every error that a user is meant to read.

    Args:
        what: What is wrong, in one sentence.
        where: The file, tensor, option or site at fault.
        fix: What the user can do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        parts = [what if where is None else f"{where}: {what}"]
        if fix is not None:
            parts.append(f"Fix: {fix}")
        super().__init__("\n".join(parts))


class InputError(RkExportError):
    """The user's input cannot be used: a bad file, option, plan or bundle."""


class FieldError(InputError, ValueError):
    """A value that one of our dataclasses refuses; as a ValueError it gets its place in the file that is read."""


class UnsupportedModelError(RkExportError):
    """The architecture, or one of its options, is refused before any work begins."""


class ProviderError(RkExportError):
    """An execution provider or a device was asked for and cannot be had."""


class FusionError(RkExportError):
    """A planned graph pattern was not found in the exported graph."""


class ParityError(RkExportError):
    """A parity tier is out of its bound."""

    exit_code = 1
