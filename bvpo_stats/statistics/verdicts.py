"""What a user wants to know of a given alpha: does the mix beat both of its parts, and does it beat doing nothing?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.alpha import AlphaInterval, alpha_interval, minimiser
from bvpo_stats.statistics.estimates import LinearRatio, estimates, noise_scale
from bvpo_stats.statistics.intervals import (
    RatioSets,
    SimpleInterval,
    jackknife_covariance,
    jackknife_normal,
    ratio_sets,
    t_quantile,
)
from bvpo_stats.statistics.squared_norm import MARGINAL, squared_norm
from bvpo_stats.statistics.summary import Array, MomentSummary

Answer = Literal["yes", "no", "undecided"]


@dataclass(frozen=True)
class FixedAlphaVerdict:
    """Whether a fixed alpha beats the trace gradient and the empty-trace gradient.

    Attributes:
        alpha: The weight in question, such as the paper's 0.5.
        beats_trace: Whether the mix has less error than g_t alone, at the confidence level.
        beats_empty: Whether it has less error than g_e alone.
        window_low: ``2 alpha_unc - 1``; the mix beats both parts for alpha strictly between it and `window_high`.
        window_high: ``2 alpha_unc``.
        level: Confidence level of each of the two answers.
        batch_size: Examples per step.
        eta_l: Learning rate times smoothness.
    """

    alpha: float
    beats_trace: Answer
    beats_empty: Answer
    window_low: float
    window_high: float
    level: float
    batch_size: float
    eta_l: float

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        where = f"At batch size {self.batch_size:g} and eta L = {self.eta_l:g}, alpha = {self.alpha:g}"
        both = {self.beats_trace, self.beats_empty}
        if both == {"yes"}:
            return f"{where} beats both the trace gradient and the empty-trace gradient ({self.level:.0%} confidence)."
        if "no" in both:
            better = "trace" if self.beats_trace == "no" else "empty-trace"
            return f"{where} is worse than the {better} gradient alone ({self.level:.0%} confidence)."
        answers = {"trace": self.beats_trace, "empty-trace": self.beats_empty}
        unknown = [name for name, answer in answers.items() if answer == "undecided"]
        return f"{where}: these prompts do not tell whether it beats the {' or the '.join(unknown)} gradient."


def fixed_alpha_verdict(
    summary: MomentSummary, alpha: float, *, batch_size: float = 1.0, eta_l: float = 1.0, level: float = 0.95
) -> FixedAlphaVerdict:
    """Test a fixed alpha in (0, 1) against both parts.

    With ``E(a) - E(alpha_unc) = A (a - alpha_unc)^2``, the mix beats g_t iff ``alpha_unc < (1 + alpha) / 2`` and beats
    g_e iff ``alpha_unc > alpha / 2``: it beats both iff alpha lies in ``(2 alpha_unc - 1, 2 alpha_unc)``, not "for any
    nontrivial mixture". Each is a test of the sign of ``B - c A`` with the jackknife standard error and t_{G-1}.

    Raises:
        UserError: alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise UserError(f"a mixture needs alpha strictly between 0 and 1, got {alpha}.")
    tau, parts = noise_scale(batch_size, eta_l), estimates(summary)
    B, A = parts.numerator(tau), parts.denominator(tau)
    contrasts = np.stack([B - (1 + alpha) / 2 * A, alpha / 2 * A - B])
    error = np.sqrt(np.diagonal(jackknife_covariance(contrasts, summary.group_sizes)))
    q = t_quantile(level, summary.n_groups)
    answers: list[Answer] = []
    for value, half in zip(contrasts[:, 0], q * error, strict=True):
        answers.append("yes" if value + half < 0 else "no" if value - half > 0 else "undecided")
    with np.errstate(invalid="ignore", divide="ignore"):
        unclipped = float(B[0] / A[0])
    return FixedAlphaVerdict(alpha, answers[0], answers[1], 2 * unclipped - 1, 2 * unclipped, level, batch_size, eta_l)


def error_table(
    summary: MomentSummary, *, alpha: float = 0.5, batch_size: float = 1.0, eta_l: float = 1.0, level: float = 0.95
) -> dict[str, SimpleInterval]:
    """Error of one step, ``norm(bias)^2 + (eta L / B) Var``, of every candidate direction.

    Keys: ``trace`` (alpha = 1), ``empty`` (alpha = 0), ``fixed`` (the given alpha, the paper's 0.5), ``alpha_star``,
    ``zero`` (the zero vector: ``norm(mu)^2``) and ``shrunk_trace`` (the best multiple of g_t). The mean squared error
    rewards small vectors where noise drowns the signal, so the last two belong beside the others.

    The rows ``alpha_star`` and ``shrunk_trace`` use weights fitted to the same data and so are slightly too good,
    by A times the variance of the weight; to first order the interval does not notice.
    """
    tau, parts = noise_scale(batch_size, eta_l), estimates(summary)
    best = float(np.nan_to_num(minimiser(parts.numerator(tau)[0], parts.denominator(tau)[0]), nan=0.5))
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = float(np.nan_to_num(parts.shrink_factor(tau)[0], posinf=0.0, neginf=0.0))
    rows: dict[str, Array] = {
        "trace": parts.error(1.0, tau),
        "empty": parts.error(0.0, tau),
        "fixed": parts.error(alpha, tau),
        "alpha_star": parts.error(best, tau),
        "shrunk_trace": parts.shrunk_error(factor, tau),
    }
    table = {name: jackknife_normal(row, summary.group_sizes, level, floor=0.0) for name, row in rows.items()}
    return table | {"zero": squared_norm(summary, MARGINAL, level)}


def trace_sampling_share(summary: MomentSummary, *, level: float = 0.95) -> AlphaInterval:
    """Share of ``tr Sigma_t`` that sampling the traces causes, answers held fixed (the variance of Theorem 1).

    The rest, ``tr Sigma_t`` less that part, comes from the data.

    Raises:
        UserError: No second trace draws were given.
    """
    parts = estimates(summary)
    if parts.var_trace_sampling is None:
        raise UserError("the trace-sampling share needs a second trace draw (trace2) for some examples; give it.")
    return alpha_interval(LinearRatio(parts.var_trace_sampling, parts.var_trace, None), summary, level)


@dataclass(frozen=True)
class ConditionalVarianceRatio:
    """``Var(g_e | x) / Var(g_t | x)`` with answers resampled too, against what Theorem 1 would need.

    Attributes:
        sets: Fieller set of the ratio.
        alpha: The weight in question.
        threshold: ``(1 + alpha) / (1 - alpha)``; ``Var(g_c | x) <= Var(g_t | x)`` iff the ratio is at most this.
        holds: Whether the ratio lies below it, at the confidence level.
    """

    sets: RatioSets
    alpha: float
    threshold: float
    holds: Answer


def conditional_variance_ratio(
    summary: MomentSummary, alpha: float = 0.5, *, level: float = 0.95
) -> ConditionalVarianceRatio:
    """Does mixing reduce the variance given the prompt once the sampling of the empty-trace answer counts?

    Theorem 1 holds y' fixed. Given x, with g_t and g_e drawn independently,
    ``Var(g_c | x) = alpha^2 Var(g_t | x) + (1 - alpha)^2 Var(g_e | x)``. Needs prompts with two pairs or more.

    Raises:
        UserError: alpha outside [0, 1), or no prompt has two pairs.
    """
    parts = estimates(summary)
    if parts.within_trace is None or parts.within_empty is None:
        raise UserError("the variance given the prompt needs prompts with two pairs or more; sample more pairs.")
    if not 0 <= alpha < 1:
        raise UserError(f"alpha must lie in [0, 1), got {alpha}.")
    # A group without such prompts changes nothing when it is left out; one that holds them all cannot be left out.
    sets = ratio_sets(parts.within_empty, parts.within_trace, summary.group_sizes, level)
    threshold = (1 + alpha) / (1 - alpha)
    contrast = jackknife_normal(parts.within_empty - threshold * parts.within_trace, summary.group_sizes, level)
    holds: Answer = "yes" if contrast.high < 0 else "no" if contrast.low > 0 else "undecided"
    return ConditionalVarianceRatio(sets, alpha, threshold, holds)
