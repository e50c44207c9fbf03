"""What is asked of a language model: templates, log-probabilities, per-sequence scores.

Names are loaded when they are first used, since they bring torch along.
"""

from __future__ import annotations

from bvpo_stats.lazy import on_first_use

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


__getattr__ = on_first_use(__name__, _HOMES)
