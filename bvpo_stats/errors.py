"""The one exception a user is meant to read, and the checks of arguments that raise it."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class UserError(Exception):
    """Something the user gave cannot work; the message says what is wrong and what to do about it.

    The command line prints the message on stderr and exits with code 2, without a traceback unless ``--debug`` is
    given. Library code raises it for bad input only, never for its own faults.
    """


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], words: str) -> None:
    """Refuses an argument of another type: "`name` must be WORDS, not a TYPE"."""
    if not isinstance(value, kinds):
        raise UserError(f"`{name}` must be {words}, not {_named(value)}.")


def check_whole(name: str, value: Any, low: int = 1) -> None:
    """Refuses what is no whole number of at least ``low``; True is none either."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UserError(f"`{name}={_shown(value)}`: must be a whole number.")
    value = operator.index(value)
    if not low <= value < 2**63:
        bound = "must not be negative" if low == 0 and value < 0 else f"at least {low}" if value < low else "too large"
        raise UserError(f"`{name}={value}`: {bound}.")


def check_number(name: str, value: Any) -> None:
    """Refuses what is no real number; True is none either."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise UserError(f"`{name}={_shown(value)}`: must be a number.")


def check_positive(name: str, value: Any, hint: str = "") -> None:
    """Refuses what is no positive, finite number; the hint ends the message."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise UserError(f"`{name}={value}`: must be positive and finite{hint}.")


def check_choice(name: str, value: object, choices: Iterable[Any]) -> None:
    """Refuses a word that is none of the choices."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise UserError(f"`{name}={_shown(value)}`: choose one of {', '.join(map(str, known))}.")


def rows_of(name: str, source: Any) -> Iterator[Any]:
    """The rows of an iterable; refuses what is none, or is a text or one row where rows belong."""
    if isinstance(source, (str, bytes, Mapping)) or not isinstance(source, Iterable):
        raise UserError(f"`{name}` must be a list, a dataset or another iterable of rows, not {_named(source)}.")
    return iter(source)


def _named(value: object) -> str:
    """A value by its type."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def _shown(value: object) -> str:
    """A value on one line, in short."""
    return repr(value) if isinstance(value, (str, int, float, bool)) else _named(value)
