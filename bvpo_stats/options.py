"""Options of configurations: help and limits beside the field they belong to, for Python and the command line alike.

A configuration is a frozen dataclass whose fields are annotated with `Option`; `check_options` refuses what a field
cannot be, and the command line makes its options from the same annotations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from bvpo_stats.errors import UserError, shown
from bvpo_stats.records import MODES, Mode

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    Path: "a path",
}


@dataclass(frozen=True)
class Option:
    """What a field of a configuration is for, and what it may be.

    Attributes:
        help: One or two sentences.
        name: Name on the command line, where it is not the field's, e.g. ``loss``.
        low: Least value. Numbers have a range: `low` or `above`, and `high` or `below`.
        high: Greatest value.
        above: Bound that a value must exceed.
        below: Bound that a value must stay under.
        hint: What to say about a value out of these bounds.
        shown: The default in words, where it depends on other fields.
        read: Reads the words on the command line; the type does where it is None.
        spelled: The default as the command line spells it, for ``read``.
        metavar: What the command line says the option takes.
        blank: Whether an empty text means something; mostly it is a shell variable that is not set.
    """

    help: str
    name: str | None = None
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    hint: str = ""
    shown: str | None = None
    read: Callable[[str], Any] | None = None
    spelled: str | None = None
    metavar: str | None = None
    blank: bool = False


@dataclass(frozen=True)
class Group:
    """A field that is a dataclass with options of its own, some of which read differently here.

    Attributes:
        options: Field of the group to the option that replaces its own; None for none.
    """

    options: dict[str, Option | None]


@functools.cache
def field_types(config: type) -> dict[str, tuple[Any, Option | Group | None]]:
    """Type and option of each field of a configuration, in order."""
    hints = get_type_hints(config, include_extras=True)
    found: dict[str, tuple[Any, Option | Group | None]] = {}
    for entry in fields(config):
        hint = hints[entry.name]
        extras = getattr(hint, "__metadata__", ())
        option = next((extra for extra in extras if isinstance(extra, Option | Group)), None)
        found[entry.name] = (get_args(hint)[0] if get_origin(hint) is Annotated else hint, option)
    return found


def members(kind: Any) -> tuple[Any, ...]:
    """The types that a union is made of; the type itself where it is none."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def check_options(config: Any) -> None:
    """Refuses fields of the wrong type, numbers out of their bounds, words that are no choice, and empty texts.

    Args:
        config: An instance of a configuration; fields without an `Option` are left alone.

    Raises:
        UserError: Names the first such field, its value, and what it may be.
    """
    own: type = type(config)
    for name, (kind, option) in field_types(own).items():
        if isinstance(option, Option):
            _check(name, getattr(config, name), kind, option)


def _check(name: str, value: Any, kind: Any, option: Option) -> None:
    kinds = members(kind)
    if value is None and NoneType in kinds:
        return
    choices = [word for each in kinds if get_origin(each) is Literal for word in get_args(each)]
    plain = [each for each in kinds if each in _WORDS]
    if isinstance(value, str) and value in choices:
        return
    many = next((each for each in kinds if get_origin(each) is tuple), None)
    if many is not None and isinstance(value, tuple):
        for each in value:
            _check(name, each, get_args(many)[0], option)
        return
    if plain and not any(_is(value, each) for each in plain):
        words = [*(_WORDS[each] for each in plain), *choices]
        words += [option.spelled] if option.spelled is not None and NoneType in kinds else []  # e.g. auto
        raise UserError(f"`{name}={shown(value)}`: must be {' or '.join(words)}.")
    if choices and not plain:
        raise UserError(f"`{name}={shown(value)}`: unknown. Choose one of {', '.join(map(str, choices))}.")
    if not plain and many is not None:
        raise UserError(f"`{name}={shown(value)}`: must be a tuple.")
    if isinstance(value, str | Path):
        problem = _unusable_text(str(value), option)
        if problem:
            raise UserError(f"`{name}={str(value)!r}`: {problem}.")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        problem = _out_of_bounds(value, option)
        if problem:
            raise UserError(f"`{name}={shown(value)}`: must {option.hint or problem}.")


def _unusable_text(words: str, option: Option) -> str | None:
    """Why a text is none that anybody means."""
    if not words.strip() and not option.blank:
        return "is empty; is a shell variable not set? Give a value, or leave it out"
    if "\0" in words:
        return "holds a NUL character, which no name and no prompt has"
    if any("\ud800" <= character <= "\udfff" for character in words):
        return "is not UTF-8, so that no record of the run could hold it"
    return None


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, str | Path) if kind is Path else isinstance(value, kind)


def _out_of_bounds(value: float, option: Option) -> str | None:
    """What the value must do and does not; nothing is ever infinite, or beyond 64 bits."""
    if isinstance(value, float) and not math.isfinite(value):
        return "be finite"
    low, high, above, below = option.low, option.high, option.above, option.below
    too_low = (low is not None and value < low) or (above is not None and value <= above)
    too_high = (high is not None and value > high) or (below is not None and value >= below)
    if not too_low and not too_high:
        return "be less than 2^63" if isinstance(value, int) and abs(value) >= 2**63 else None
    least = f"at least {low:,g}" if low is not None else f"above {above:g}" if above is not None else ""
    most = f"at most {high:,}" if high is not None else f"below {below:,}" if below is not None else ""
    if too_low and (not most or (high or below or 0) > 1):  # where the range ends above is of no interest here
        return "be positive" if least == "above 0" else f"be {least}"
    return "be " + " and ".join(words for words in (least, most) if words)


def number_or_auto(words: str) -> int | str | None:
    """Reads a number of responses drawn at once, None for ``auto``; what is neither is left to the field to judge."""
    return None if words == "auto" else whole_or_word(words)


def number_or_word(words: str) -> float | str:
    """Reads a number; what is none stays a word, for the field to judge."""
    try:
        return float(words)
    except ValueError:
        return words


def whole_or_word(words: str) -> int | str:
    """Reads a whole number; what is none stays a word, for the field to judge."""
    try:
        return int(words)
    except ValueError:
        return words


def names_or_all(words: str) -> str | tuple[str, ...]:
    """Reads names of layers separated by commas; ``all-linear`` stays as it is."""
    return words if words == "all-linear" else tuple(words.replace(" ", "").split(","))


def modes(words: str) -> tuple[Mode, ...]:
    """Reads ``thinking``, ``nothinking`` or ``both``."""
    if words == "both":
        return MODES
    if words not in MODES:
        raise UserError(f"`modes={words!r}`: choose thinking, nothinking or both.")
    return tuple(known for known in MODES if known == words)


# Options that several configurations share.
Samples = Annotated[
    int, Option("Responses per prompt and mode.", low=1, high=10**6, hint="lie between 1 and a million")
]
Seed = Annotated[int, Option("Decides every random draw.", low=0, high=2**32 - 1)]  # more is too much for NumPy
Level = Annotated[
    float, Option("Confidence level of the intervals.", above=0, below=1, hint="lie between 0 and 1, e.g. 0.95")
]
Limit = Annotated[int | None, Option("Use only the first so many prompts.", low=1, high=10**12)]
Temperature = Annotated[
    float, Option("Sampling temperature.", low=1e-3, high=1e3, hint="be positive, between 0.001 and 1000")
]
TopP = Annotated[
    float, Option("Nucleus mass; 1 is off (anything less makes g_t biased even at the reference).", above=0, high=1)
]
MaxNewTokens = Annotated[
    int | None, Option("Cut responses at this many tokens.", low=1, high=10**8, shown="256 embedded, else 4096")
]
BatchSize = Annotated[
    int | None,
    Option(
        "Responses drawn at once: a number or `auto`. Does not change the results.",
        low=1,
        high=10**6,
        read=number_or_auto,
        spelled="auto",
    ),
]
Modes = Annotated[tuple[Mode, ...], Option("thinking, nothinking or both.", name="mode", read=modes, spelled="both")]
MaxTokens = Annotated[
    int, Option("Padded tokens per forward: what bounds memory. Does not change the results.", low=1, high=10**9)
]
PushToHub = Annotated[
    str | None,
    Option("Repository on the Hugging Face hub, OWNER/NAME, that takes the result and its card; a new one is private."),
]
Prompts = Annotated[str, Option("JSONL file with a field `prompt`, a dataset's folder or hub id, or `embedded`.")]
ConfigName = Annotated[str | None, Option("Configuration of a dataset that has several.", shown="the only one")]
PromptSplit = Annotated[str, Option("Split of a dataset given as `prompts`.")]


def max_new_tokens(asked: int | None, model: str) -> int:
    """The cut-off in tokens: as asked for, else 256 for the embedded model with its short responses, and 4096."""
    return asked if asked is not None else 256 if model == "embedded" else 4096
