"""Figures printed in the paper, to stand beside measured ones. Source: BVPO paper, Appendix B, Tables 3, 4 and 5."""

from __future__ import annotations

PublishedRow = dict[str, dict[str, float]]

APPENDIX_B: dict[str, PublishedRow] = {
    "R1-Qwen-7B": {
        "table3": {"logp_variance_ratio": 10.17, "length_variance_ratio": 2.91},
        "table4": {
            "mean_length_ratio": 3.17,
            "nll_think": 0.384,
            "nll_no": 0.316,
            "delta_nll": 0.068,
            "percent_increase": 21.5,
        },
        "table5": {"trace_token_share": 0.639, "nll_trace": 0.453, "nll_answer": 0.261, "nll_ratio": 1.73},
    },
    "R1-Qwen-1.5B": {
        "table3": {"logp_variance_ratio": 3.68, "length_variance_ratio": 1.32},
        "table4": {
            "mean_length_ratio": 2.72,
            "nll_think": 0.572,
            "nll_no": 0.496,
            "delta_nll": 0.076,
            "percent_increase": 15.4,
        },
        "table5": {"trace_token_share": 0.612, "nll_trace": 0.679, "nll_answer": 0.403, "nll_ratio": 1.69},
    },
    "R1-0528-Qwen3-8B": {
        "table3": {"logp_variance_ratio": 1.23, "length_variance_ratio": 1.11},
        "table4": {
            "mean_length_ratio": 1.86,
            "nll_think": 0.456,
            "nll_no": 0.381,
            "delta_nll": 0.075,
            "percent_increase": 19.8,
        },
        "table5": {"trace_token_share": 0.549, "nll_trace": 0.484, "nll_answer": 0.422, "nll_ratio": 1.15},
    },
}

_PATTERNS = {
    "r1-distill-qwen-7b": "R1-Qwen-7B",
    "r1-distill-qwen-1.5b": "R1-Qwen-1.5B",
    "r1-0528-qwen3-8b": "R1-0528-Qwen3-8B",
}


def published_name(model: str) -> str | None:
    """The paper's name of a model, None when it is not one of the paper's three.

    >>> published_name("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    'R1-Qwen-1.5B'
    """
    folded = model.lower()
    return next((name for pattern, name in _PATTERNS.items() if pattern in folded), None)
