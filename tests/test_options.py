"""Fields of a configuration: what they cannot be is refused in one line that names them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.options import Option, check_options


@dataclass(frozen=True)
class Settings:
    steps: Annotated[int, Option("", low=1)] = 1
    most: Annotated[int | None, Option("", low=1)] = None
    share: Annotated[float, Option("", above=0, high=1)] = 0.5
    rate: Annotated[float, Option("", above=0)] = 0.5
    level: Annotated[float, Option("", above=0, below=1, hint="lie between 0 and 1, e.g. 0.95")] = 0.5
    anything: Annotated[float, Option("")] = 0.5
    name: Annotated[str | None, Option("")] = None
    file: Annotated[Path | None, Option("")] = None
    choice: Annotated[Literal["a", "b"], Option("")] = "a"
    flag: Annotated[bool, Option("")] = False
    many: Annotated[str | tuple[str, ...], Option("")] = "all"
    eta: Annotated[float | Literal["auto"], Option("", above=0)] = 1.0
    free: int = 0

    def __post_init__(self) -> None:
        check_options(self)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, "`steps=0`: must be at least 1"),
        ("steps", -7, "`steps=-7`: must be at least 1"),
        ("steps", 10**20, "`steps=100000000000000000000`: must be less than"),
        ("steps", 1.5, "a whole number"),
        ("steps", "3", "`steps='3'`: must be a whole number"),
        ("steps", True, "a whole number"),
        ("steps", None, "a whole number"),
        ("most", 0, "at least 1"),
        ("share", 0, "above 0 and at most 1"),
        ("share", 1.01, "above 0 and at most 1"),
        ("rate", 0, "`rate=0`: must be positive"),
        ("rate", -1.0, "positive"),
        ("rate", math.nan, "`rate=nan`: must be finite"),
        ("rate", math.inf, "finite"),
        ("level", 1, "`level=1`: must lie between 0 and 1"),
        ("anything", -math.inf, "finite"),
        ("anything", "x", "a number"),
        ("name", 3, "`name=3`: must be a text"),
        ("name", "", "`name=''`: is empty"),
        ("name", "a\0b", "NUL"),
        ("file", 3, "a path"),
        ("choice", "c", "`choice='c'`: unknown. Choose one of a, b."),
        ("flag", "yes", "True or False"),
        ("many", 3, "a text"),
        ("eta", 0.0, "`eta=0.0`: must be positive"),
        ("eta", "fast", "`eta='fast'`: must be a number or auto"),
    ],
)
def test_what_a_field_cannot_be(field: str, value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        Settings(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 1),
        ("most", None),
        ("share", 1),
        ("share", 1e-300),
        ("rate", 3),
        ("level", 0.5),
        ("anything", -1e300),
        ("file", "somewhere"),
        ("file", Path("somewhere")),
        ("choice", "b"),
        ("flag", True),
        ("many", "one"),
        ("eta", "auto"),
        ("many", ("one", "two")),
        ("free", "no option, no check"),
    ],
)
def test_what_a_field_can_be(field: str, value: Any) -> None:
    assert getattr(Settings(**{field: value}), field) == value
