"""Doctests that stand in a docstring without a heading, shown as code rather than as a quotation."""

from __future__ import annotations

import re
from typing import Any

import griffe

_BLOCK = re.compile(r"(?:^|(?<=\n\n))(>>> .*?)(?=\n\n|\Z)", re.DOTALL)


class Doctests(griffe.Extension):
    """Puts a fence around each block of ``>>>`` lines."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = _BLOCK.sub(r"```pycon\n\1\n```", obj.docstring.value)
