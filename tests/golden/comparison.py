"""When two records are the same: equal but for the last digits of real numbers, and for what is named here."""

from __future__ import annotations

import math
import re
from typing import Any

LEFT_OUT = frozenset({"versions", "seconds", "tokens_per_second"})
"""Fields that differ between equal runs: software, and how fast the machine was. They are not in the records at all."""

RELATIVE = 1e-6
ABSOLUTE = 1e-9

_ADAPTER = re.compile(r"\bmodel@[0-9a-f]{12}")  # a fingerprint of trained weights, which takes in their last bits
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*\.\d+(?:e[+-]?\d+)?")  # a real number as it is printed


def differences(kept: Any, found: Any, place: str = "", relative: float = RELATIVE) -> list[str]:
    """Every place where two records differ, with both values.

    Args:
        kept: The committed record.
        found: That of this run.
        place: Where they stand in the whole, for the message.
        relative: How far real numbers may be apart.
    """
    if isinstance(kept, dict) and isinstance(found, dict):
        missing = [f"{place}.{key}: {kept[key]!r:.200} is gone" for key in kept.keys() - found.keys()]
        new = [f"{place}.{key}: {found[key]!r:.200} is new" for key in found.keys() - kept.keys()]
        common = [differences(kept[key], found[key], f"{place}.{key}", relative) for key in kept if key in found]
        return [*sorted(missing), *sorted(new), *(line for lines in common for line in lines)]
    if isinstance(kept, list) and isinstance(found, list):
        if len(kept) != len(found):
            return [f"{place}: {len(kept)} entries, now {len(found)}: {kept!r:.200} -> {found!r:.200}"]
        pairs = enumerate(zip(kept, found, strict=True))
        return [line for n, (old, new) in pairs for line in differences(old, new, f"{place}[{n}]", relative)]
    same = _same_text if isinstance(kept, str) and isinstance(found, str) else _same_number
    return [] if same(kept, found, relative) else [f"{place}: {kept!r} -> {found!r}"]


def _same_number(kept: Any, found: Any, relative: float) -> bool:
    if type(kept) is not type(found):
        return False
    if isinstance(kept, float):
        return math.isclose(kept, found, rel_tol=relative, abs_tol=ABSOLUTE) or (math.isnan(kept) and math.isnan(found))
    return bool(kept == found)


def _same_text(kept: str, found: str, relative: float) -> bool:
    """Equal words; real numbers in them may differ by one unit of the last digit printed: rounding turns over."""
    if kept == found:
        return True
    kept, found = (_ADAPTER.sub("model@...", text) for text in (kept, found))
    if _NUMBER.sub("#", kept) != _NUMBER.sub("#", found):
        return False
    return all(_same_print(*both) for both in zip(_NUMBER.findall(kept), _NUMBER.findall(found), strict=True))


def _same_print(kept: str, found: str) -> bool:
    digits, _, exponent = kept.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(float(kept.replace(",", "")) - float(found.replace(",", ""))) < 1.01 * unit
