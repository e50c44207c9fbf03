"""Where mu came from, and the trace weights of all answers in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from bvpo_stats.gradients.examples import Example
from bvpo_stats.gradients.ladder import MarginalChoice
from bvpo_stats.gradients.marginal import SideDiagnostics
from bvpo_stats.studies.alpha_star.entries import Marginal, finite


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


def bias_warnings(choice: MarginalChoice, examples: Sequence[Example]) -> tuple[str, ...]:
    """Flags an estimator of mu that is biased by construction here: that bias shifts alpha, and no prompts cure it.

    Self-normalised weights are unbiased only where one trace is an exact posterior draw of theta; a pair's own trace is
    one at theta_ref and temperature 1, nowhere else. The antithetic multilevel estimate
    is left with one of order 1/K^2, because a bank of K traces ends its levels.

    Args:
        choice: Rung of the ladder.
        examples: For the temperature of pairs (the anchors) and traces.
    """
    off_reference = choice.drift > 0
    cooled = any(record.temperature != 1 for example in examples for record in example.records)
    biased = choice.method in ("prior", "jackknife") or (
        choice.method in ("anchored", "posterior") and (off_reference or cooled)
    )
    if not biased or not choice.estimable:
        return ()
    return (
        f"The {choice.method} estimate of mu is biased by construction here (of order 1/K for K traces): alpha shifts "
        "by E(g_t - g_e) . bias / A, which more prompts do not reduce. More traces do; `method='multilevel'` "
        "leaves a bias of order 1/K^2.",
    )


def _median(values: Sequence[float]) -> float | None:
    return finite(median(values)) if values else None
