"""Where mu came from, and the trace weights of all answers in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from bvpo_stats.estimators.ladder import MarginalChoice
from bvpo_stats.estimators.marginal import SideDiagnostics
from bvpo_stats.studies.alpha_star_report import Marginal, finite


def marginal_entry(choice: MarginalChoice, diagnostics: Sequence[SideDiagnostics]) -> Marginal:
    """The report's section on the marginal gradient; medians are over answers.

    Args:
        choice: Rung of the ladder.
        diagnostics: Trace weights of every answer; empty where the method uses no traces.
    """
    weights = [entry.weights for entry in diagnostics]
    gaps = [w.anchor_gap for w in weights if w.anchor_gap is not None]
    tails = [w.k_hat for w in weights if w.k_hat is not None]
    tested = [w.certified for w in weights if w.anchor_gap is not None or w.k_hat is not None]
    return Marginal(
        method=choice.method,
        rung=choice.rung,
        reason=choice.reason,
        estimable=choice.estimable,
        traces_per_answer=_median([float(w.traces) for w in weights]),
        ess=_median([w.effective_size for w in weights]),
        largest_weight=_median([w.largest for w in weights]),
        anchor_gap=_median(gaps),
        log_traces=_median([w.log_traces for w in weights]),
        k_hat=_median(tails),
        k_threshold=_median([w.k_threshold for w in weights if math.isfinite(w.k_threshold)]),
        certified_share=sum(tested) / len(tested) if tested else None,
        answers={
            "ess": [finite(w.effective_size) for w in weights],
            "anchor_gap": [None if w.anchor_gap is None else finite(w.anchor_gap) for w in weights],
        },
    )


def _median(values: Sequence[float]) -> float | None:
    return finite(median(values)) if values else None
