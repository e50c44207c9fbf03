"""What every report has in common: versions of the software, and JSON without NaN."""

from __future__ import annotations

import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("bvpo-stats", "torch", "transformers", "peft", "tokenizers", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # pragma: no cover - only when run from a source tree that was never installed
            found[package] = "not installed"
    return found


def to_json(report: dict[str, Any]) -> str:
    """Indented JSON with a final newline; NaN and infinities become null, so that any reader takes it."""
    return json.dumps(_clean(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
