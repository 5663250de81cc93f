"""Errors that a user can act on, each with the exit code of the command line.

A message names what was found (file, line or row, field, value) and the mend.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecboleMMError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is that of the command line."""

    exit_code = 1


class InputError(RecboleMMError, ValueError):
    """Bad input or configuration (exit code 2)."""

    exit_code = 2


class EnvironmentFault(RecboleMMError, RuntimeError):  # noqa: N818  (EnvironmentError is taken)
    """The machine said no: a missing package, a full disk, a read-only folder (exit code 3)."""

    exit_code = 3


class OutOfMemory(EnvironmentFault):
    """The device has no memory for what the configuration asks (exit code 3)."""


class NumericalError(RecboleMMError, ArithmeticError):
    """A loss, gradient or score stopped being finite (exit code 4)."""

    exit_code = 4


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse the value of an option that is none of its choices."""
    choices = tuple(choices)
    if value not in choices:
        raise InputError(f"{name}: {value!r} is unknown; use one of {', '.join(map(str, choices))}")


def printable(text: str) -> str:
    """Text of a stranger's file or name, with what a terminal would obey spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the most similar known name, else an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(known)}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""
