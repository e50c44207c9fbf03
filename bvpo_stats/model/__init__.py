"""What is asked of a language model: templates, log-probabilities, per-sequence scores.

Names are loaded when they are first used, since they bring torch along.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "LoraOptions": "subset",
    "Policy": "policy",
    "PolicyOptions": "policy",
    "create_lora": "subset",
    "load_policy": "policy",
    "lora_subset": "subset",
    "with_lora": "policy",
    "score_pass": "scores",
}

__all__ = [
    "LoraOptions",
    "Policy",
    "PolicyOptions",
    "create_lora",
    "load_policy",
    "lora_subset",
    "score_pass",
    "with_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
