"""Studies: configuration in, report out. Names are loaded when they are first used, since most bring torch along."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AlphaConfig": "alpha_star.config",
    "AlphaInputs": "alpha_star.config",
    "AlphaOptions": "alpha_star.run",
    "AlphaReport": "alpha_star.report",
    "Definitions": "variance.report",
    "VarianceConfig": "variance.config",
    "VarianceReport": "variance.report",
    "run_alpha_star": "alpha_star.run",
    "run_variance": "variance.run",
}

__all__ = [
    "AlphaConfig",
    "AlphaInputs",
    "AlphaOptions",
    "AlphaReport",
    "Definitions",
    "VarianceConfig",
    "VarianceReport",
    "run_alpha_star",
    "run_variance",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
