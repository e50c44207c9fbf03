"""Studies: configuration in, report out. Names are loaded when they are first used, since most bring torch along."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AlphaConfig": "alpha_star",
    "AlphaInputs": "alpha_star_inputs",
    "AlphaOptions": "alpha_star",
    "AlphaReport": "alpha_star_report",
    "Definitions": "variance_tables",
    "OracleTrainingConfig": "oracle_training",
    "VarianceConfig": "variance",
    "VarianceReport": "variance_report",
    "check_theorems": "theorems",
    "estimate_alpha_star": "alpha_star",
    "run_alpha_star": "alpha_star",
    "run_oracle_training": "oracle_training",
    "run_theorems": "theorems",
    "run_variance": "variance",
}

__all__ = [
    "AlphaConfig",
    "AlphaInputs",
    "AlphaOptions",
    "AlphaReport",
    "Definitions",
    "OracleTrainingConfig",
    "VarianceConfig",
    "VarianceReport",
    "check_theorems",
    "estimate_alpha_star",
    "run_alpha_star",
    "run_oracle_training",
    "run_theorems",
    "run_variance",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
