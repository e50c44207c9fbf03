"""When two records are the same: equal but for the last digits of real numbers, and for what is named here."""

from __future__ import annotations

import math
import platform
import re
from pathlib import Path
from typing import Any, NamedTuple

LEFT_OUT = frozenset({"versions", "seconds", "tokens_per_second"})
"""Fields that differ between equal runs: software, and how fast the machine was. They are not in the records at all."""


class Tolerance(NamedTuple):
    """How far apart equal numbers may be.

    Attributes:
        relative: For real numbers.
        absolute: Likewise, near zero.
        fingerprints: Whether fingerprints of files with log-probabilities, which take in their last bits, must agree.
    """

    relative: float = 1e-6
    absolute: float = 1e-9
    fingerprints: bool = True


# Another CPU adds float32 numbers up in another order. Most records bear it: tokens are integers, the enumerable model
# is float64. Where they do not, the tolerance is about four times what another instruction set was seen to change.
_ELSEWHERE = {
    "variance": 1e-4,  # log-probabilities of single tokens near 0, kept to seven places, and intervals from them
    "alpha-star": 1e-3,  # differences of squared norms that nearly cancel, such as norm(bias)^2
    "alpha-star-off-reference": 1e-3,  # likewise, and the adapter is trained
    "train": 1e-3,  # rewards are 0.1 (log p - log p_ref): from two numbers near -10, one near 0.001 is left
    "train-adaptive": 1e-3,  # likewise, and alpha from such differences feeds back
}


def tolerance(name: str, made_on: dict[str, Any]) -> Tolerance:
    """How closely a case must agree: to 1e-6 on the machine and software of the records, less in places elsewhere.

    Args:
        name: The case.
        made_on: :func:`machine` where the records were made.
    """
    return Tolerance() if machine() == made_on else Tolerance(_ELSEWHERE.get(name, 1e-6), fingerprints=False)


def machine() -> dict[str, Any]:
    """What decides the last bits of float32 sums here."""
    import torch

    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {
        "processor": models[0] if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


_FINGERPRINT = re.compile(r"\.identity\.(pairs|empty_pairs|traces)$")
_ADAPTER = re.compile(r"\bmodel@[0-9a-f]{12}")  # a fingerprint of trained weights, which takes in their last bits
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*\.\d+(?:e[+-]?\d+)?")  # a real number as it is printed


def differences(kept: Any, found: Any, place: str, within: Tolerance) -> list[str]:
    """Every place where two records differ, with both values.

    Args:
        kept: The committed record.
        found: That of this run.
        place: Where they stand in the whole, for the message.
        within: How far apart numbers may be.
    """
    if isinstance(kept, dict) and isinstance(found, dict):
        missing = [f"{place}.{key}: {kept[key]!r:.200} is gone" for key in kept.keys() - found.keys()]
        new = [f"{place}.{key}: {found[key]!r:.200} is new" for key in found.keys() - kept.keys()]
        common = [differences(kept[key], found[key], f"{place}.{key}", within) for key in kept if key in found]
        return [*sorted(missing), *sorted(new), *(line for lines in common for line in lines)]
    if isinstance(kept, list) and isinstance(found, list):
        if len(kept) != len(found):
            return [f"{place}: {len(kept)} entries, now {len(found)}: {kept!r:.200} -> {found!r:.200}"]
        pairs = enumerate(zip(kept, found, strict=True))
        return [line for n, (old, new) in pairs for line in differences(old, new, f"{place}[{n}]", within)]
    if isinstance(kept, str) and isinstance(found, str):
        same = _same_text(kept, found) or (not within.fingerprints and bool(_FINGERPRINT.search(place)))
    else:
        same = _same_number(kept, found, within)
    return [] if same else [f"{place}: {kept!r} -> {found!r}"]


def _same_number(kept: Any, found: Any, within: Tolerance) -> bool:
    if type(kept) is not type(found):
        return False
    if isinstance(kept, float):
        close = math.isclose(kept, found, rel_tol=within.relative, abs_tol=within.absolute)
        return close or (math.isnan(kept) and math.isnan(found))
    return bool(kept == found)


def _same_text(kept: str, found: str) -> bool:
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
