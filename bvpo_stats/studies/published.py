"""Figures printed in the paper, to stand beside measured ones. Source: BVPO paper, Tables 1 to 5."""

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

METHODS = ("base", "SimPO", "DPO", "BVPO")

# Table 1, win rates in percent, judge GPT-4o-2024-11-20: Arena-Hard against GPT-4-0314, AlpacaEval 2 against GPT-4
# Turbo, and AlpacaEval 2 length-controlled.
_TABLE_1_COLUMNS = (
    ("arena-hard", "win_rate"),
    ("alpaca-eval", "win_rate"),
    ("alpaca-eval", "lc_win_rate"),
)
_TABLE_1 = {
    "R1-Qwen-7B": {
        "thinking": ((16.3, 15.7, 18.4), (19.0, 17.8, 20.2), (19.1, 18.3, 20.4), (24.2, 26.1, 25.5)),
        "nothinking": ((16.7, 15.2, 17.0), (17.2, 19.1, 20.3), (17.7, 19.3, 20.7), (24.5, 25.2, 25.2)),
    },
    "R1-Qwen-1.5B": {
        "thinking": ((4.4, 5.4, 6.3), (5.5, 6.2, 8.4), (5.1, 6.4, 8.0), (8.7, 8.6, 9.4)),
        "nothinking": ((5.5, 6.9, 6.9), (4.5, 4.6, 3.8), (7.2, 7.8, 7.1), (8.0, 10.6, 10.3)),
    },
    "R1-0528-Qwen3-8B": {
        "thinking": ((65.4, 48.7, 39.6), (69.2, 49.1, 44.9), (68.7, 48.9, 44.3), (71.5, 50.6, 45.9)),
        "nothinking": ((65.2, 37.5, 31.8), (62.1, 41.2, 41.5), (61.6, 40.3, 40.0), (66.8, 46.6, 48.4)),
    },
}

# Table 2, accuracies in percent; the paper does not say in which mode, its figures are those of reasoning models.
_TABLE_2_COLUMNS = ("aime24", "aime25", "amc", "math-500", "minerva", "olympiadbench", "average")
_TABLE_2 = {
    "R1-Qwen-7B": (
        (56.3, 40.3, 79.7, 89.2, 40.1, 57.5, 60.5),
        (55.8, 38.2, 80.7, 88.2, 41.2, 58.4, 60.4),
        (55.0, 40.7, 80.8, 89.8, 40.8, 59.0, 61.0),
        (58.4, 41.0, 81.2, 89.4, 43.0, 60.9, 62.3),
    ),
    "R1-Qwen-1.5B": (
        (28.6, 21.7, 62.2, 81.8, 29.0, 44.9, 44.7),
        (30.2, 23.3, 62.5, 82.6, 30.5, 46.2, 45.9),
        (31.7, 23.4, 64.9, 84.0, 33.8, 48.7, 47.8),
        (34.4, 24.4, 65.1, 83.0, 35.3, 50.1, 48.7),
    ),
    "R1-0528-Qwen3-8B": (
        (73.1, 66.0, 91.8, 96.4, 47.1, 73.5, 74.7),
        (73.9, 66.1, 91.0, 96.4, 47.5, 76.0, 75.2),
        (73.6, 65.9, 91.0, 97.6, 47.1, 76.0, 75.2),
        (76.3, 68.0, 91.7, 96.8, 46.7, 76.9, 76.1),
    ),
}
PublishedScores = dict[str, dict[str, dict[str, float]]]


def published_scores(model: str, task: str) -> PublishedScores | None:
    """The paper's scores of a model in percent, by method, mode and column; None where it is not one of its three.

    Args:
        model: Name of the model.
        task: ``math`` (Table 2, whose mode the paper leaves open: Thinking is supposed), ``alpaca-eval`` or
            ``arena-hard`` (Table 1).

    >>> published_scores("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "math")["BVPO"]["thinking"]["aime24"]
    34.4
    """
    name = published_name(model)
    if name is None:
        return None
    if task == "math":
        rows = zip(METHODS, _TABLE_2[name], strict=True)
        return {method: {"thinking": dict(zip(_TABLE_2_COLUMNS, row, strict=True))} for method, row in rows}
    wanted = [(place, column) for place, (benchmark, column) in enumerate(_TABLE_1_COLUMNS) if benchmark == task]
    return {
        method: {
            mode: {column: rows[number][place] for place, column in wanted} for mode, rows in _TABLE_1[name].items()
        }
        for number, method in enumerate(METHODS)
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
