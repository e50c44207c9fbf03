"""Studies: configuration in, report out. Names are loaded when they are first used, since most bring torch along."""

from __future__ import annotations

from bvpo_stats.lazy import on_first_use

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


__getattr__ = on_first_use(__name__, _HOMES)
