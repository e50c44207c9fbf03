"""The one exception a user is meant to read, and the checks of arguments that raise it."""

from __future__ import annotations

import math
import numbers
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any


class UserError(Exception):
    """Something the user gave cannot work; the message says what is wrong and what to do about it.

    The command line prints the message on stderr and exits with code 2, without a traceback unless ``--debug`` is
    given. Library code raises it for bad input only, never for its own faults.

    Args:
        message: Becomes one line: what it quotes from the input may hold anything, see :func:`one_line`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


wording: ContextVar[Callable[[str], str]] = ContextVar("wording", default=str)
"""How texts for people name settings: as fields between backticks, which the command line turns into its options."""

_LONGEST = 2_000  # characters of a message; a name or value in it may be a whole file
_NOT_PRINTED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control and format characters, lone surrogates, line separators


def one_line(text: str) -> str:
    r"""A text as one line that any terminal shows as it is.

    Line breaks become spaces; control characters, direction marks and lone surrogates are escaped as Python writes
    them, so that input which is quoted can neither fake a line nor colour or clear a terminal. Very long texts lose
    their middle.

    >>> one_line("two\nlines, \x1b[31mred")
    'two lines, \\x1b[31mred'
    """
    if not text.isprintable():
        text = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", text)
        text = "".join(
            c.encode("unicode_escape").decode() if unicodedata.category(c) in _NOT_PRINTED else c for c in text
        )
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], words: str) -> None:
    """Refuses an argument of another type: "`name` must be WORDS, not a TYPE"."""
    if not isinstance(value, kinds):
        raise UserError(f"`{name}` must be {words}, not {_named(value)}.")


def check_whole(name: str, value: Any, low: int = 1) -> None:
    """Refuses what is no whole number of at least ``low``; True is none either."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UserError(f"`{name}={shown(value)}`: must be a whole number.")
    value = operator.index(value)
    if not low <= value < 2**63:
        bound = "must not be negative" if low == 0 and value < 0 else f"at least {low}" if value < low else "too large"
        raise UserError(f"`{name}={shown(value)}`: {bound}.")


def check_number(name: str, value: Any) -> None:
    """Refuses what is no real number; True is none either."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise UserError(f"`{name}={shown(value)}`: must be a number.")


def check_positive(name: str, value: Any, hint: str = "") -> None:
    """Refuses what is no positive, finite number; the hint ends the message."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise UserError(f"`{name}={value}`: must be positive and finite{hint}.")


def check_level(level: Any) -> None:
    """Refuses what is no confidence level."""
    check_number("level", level)
    if not 0 < level < 1:
        raise UserError(f"the confidence level must lie between 0 and 1, got {level}; 0.95 is usual.")


def check_choice(name: str, value: object, choices: Iterable[Any]) -> None:
    """Refuses a word that is none of the choices."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise UserError(f"`{name}={shown(value)}`: choose one of {', '.join(map(str, known))}.")


def rows_of(name: str, source: Any) -> Iterator[Any]:
    """The rows of an iterable; refuses what is none, or is a text or one row where rows belong."""
    if isinstance(source, (str, bytes, Mapping)) or not isinstance(source, Iterable):
        raise UserError(f"`{name}` must be a list, a dataset or another iterable of rows, not {_named(source)}.")
    return iter(source)


def _named(value: object) -> str:
    """A value by its type."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def shown(value: object) -> str:
    """A value as Python writes it where it is a word or a number, else its type."""
    if isinstance(value, int) and value.bit_length() > 1_000:  # Python refuses to write very long numbers
        return f"a number of {value.bit_length()} bits"
    return repr(value) if isinstance(value, (str, int, float, bool)) else _named(value)
