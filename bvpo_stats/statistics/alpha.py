"""The optimal mixing weight alpha* of Theorem 2 with an honest interval, its curve, its variants, verdicts on others.

    alpha_unc = (P0 + tau P1) / (Q0 + tau Q1),   tau = eta L / B,   alpha* = clip(alpha_unc, 0, 1)

`alpha_from_gradients` is the one call for arrays of per-example gradients; `alpha_from_summary` does the same from
streamed moments.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.calibration import Mask
from bvpo_stats.statistics.estimates import Estimates, LinearRatio, estimates, noise_scale, prompt_norms
from bvpo_stats.statistics.intervals import (
    FEWEST,
    MARGINAL,
    RatioSets,
    SimpleInterval,
    Tails,
    jackknife_corrected,
    jackknife_covariance,
    jackknife_normal,
    ratio_sets,
    squared_norm,
    t_quantile,
)
from bvpo_stats.statistics.moments import Array, MomentSummary, example_rows, summary_of_arrays


@dataclass(frozen=True)
class PromptsNeeded:
    """How many prompts would identify a ratio that a sample does not.

    Attributes:
        prompts: The number, two digits of it, rounded up; None if even a million times the sample would not do.
        at_least: True where the denominator itself was not significantly positive, so that only a lower bound exists.
    """

    prompts: int | None
    at_least: bool


def prompts_needed(ratio: LinearRatio, n_prompts: int, level: float = 0.95) -> PromptsNeeded:
    """Prompts for which the set of a ratio is expected to be bounded and to say something within [0, 1].

    Takes the estimates for the truth and looks at the set that k times the prompts would give: deviations shrink by the
    root of k, interactions of groups by k, effective prompts grow by k. U-statistics of small biases carry a part of
    order ``1 / N^2`` too, so the number errs on the safe side. It is a lower bound where the estimated denominator is
    below its standard error (it is raised to that) and where too few prompts rule the estimate: how heavy a tail is
    shows late. Always more than there are, by a twelfth at least: less would be no advice.

    Args:
        ratio: Numerator and denominator, ``[1 + G]``, which the sample does not identify.
        n_prompts: Prompts in the sample.
        level: Confidence level.
    """
    denominator = ratio.denominator
    standard_error = math.sqrt(max(float(jackknife_covariance(denominator[None], ratio.group_sizes)[0, 0]), 0.0))
    weak = not denominator[0] > standard_error
    raised = max(standard_error - float(denominator[0]), 0.0)

    def first_identified(factors: Float[np.ndarray, " factors"]) -> float | None:
        identified = ratio_sets(ratio.scaled(factors[:, None], raised), level, factors).clipped()[2]
        return float(factors[identified.argmax()]) if identified.any() else None

    power = first_identified(2.0 ** np.arange(1, 21))
    if power is None:
        return PromptsNeeded(None, True)
    factor = first_identified(power * np.exp2(np.arange(-7, 0) / 8)) or power
    number = n_prompts * factor
    unit = 10 ** max(math.floor(math.log10(number)) - 1, 0)
    return PromptsNeeded(math.ceil(number / unit) * unit, weak or not bool(Tails.of(ratio).enough()))


@dataclass(frozen=True)
class AlphaInterval:
    """A mixing weight with its confidence set.

    Attributes:
        value: The weight in [0, 1] that minimises the estimated parabola; NaN where it is flat (t = e), when Theorem 2
            calls every weight optimal.
        low: Lower end of the set after clipping to [0, 1].
        high: Upper end likewise.
        level: Confidence level.
        unclipped: Estimate of alpha_unc, a ratio of unbiased estimates.
        identified: Whether the set is bounded and its clip is less than all of [0, 1]; if not, do not quote ``value``.
        unclipped_low: Lower end of the set before clipping; infinite where it is not bounded.
        unclipped_high: Upper end likewise.
        n_eff: Effective prompts behind the estimate; below `FEWEST` there is no interval.
        largest: The largest prompt's share of its variance.
        needed: How many prompts would identify it, where this sample does not.
    """

    value: float
    low: float
    high: float
    level: float
    unclipped: float
    identified: bool
    unclipped_low: float
    unclipped_high: float
    n_eff: float
    largest: float
    needed: PromptsNeeded | None

    def __str__(self) -> str:
        if self.identified:
            return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
        if self.n_eff < FEWEST:
            return f"not identified ({self.n_eff:.1f} effective prompts; {self.largest:.0%} of the variance is one's)"
        if self.needed is None or self.needed.prompts is None:
            return "not identified"
        return (
            f"not identified ({'at least' if self.needed.at_least else 'about'} {self.needed.prompts} prompts needed)"
        )


def minimiser(numerator: Array | float, denominator: Array | float) -> Array:
    """Point of [0, 1] where ``A a^2 - 2 B a`` is least: ``clip(B / A)`` for A > 0, else the better end.

    An unbiased estimate of A can be negative at small tau; then the estimated parabola opens downwards.

    >>> minimiser(np.array([0.3, 2.0, 0.1, 0.1]), np.array([1.0, 1.0, -1.0, 0.3]))
    array([0.3       , 1.        , 1.        , 0.33333333])
    """
    B, A = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = np.clip(B / A, 0.0, 1.0)
    value = np.where(A > 0, inside, np.where(A - 2 * B < 0, 1.0, 0.0))
    return np.where((A == 0) & (B == 0), np.nan, value)


def alpha_interval(ratio: LinearRatio, summary: MomentSummary, level: float = 0.95) -> AlphaInterval:
    """Interval of any weight that is a ratio of two statistics, arrays ``[1 + G]``."""
    sets = ratio_sets(ratio, level)
    low, high, identified = sets.clipped()
    return AlphaInterval(
        value=float(minimiser(ratio.numerator[0], ratio.denominator[0])),
        low=float(low),
        high=float(high),
        level=level,
        unclipped=float(sets.ratio),
        identified=bool(identified),
        unclipped_low=float(sets.low),
        unclipped_high=float(sets.high),
        n_eff=float(sets.n_eff),
        largest=float(sets.largest),
        needed=None if identified else prompts_needed(ratio, summary.n_prompts, level),
    )


@dataclass(frozen=True)
class AlphaStar(AlphaInterval):
    """alpha* for one batch size and step size, with the moments it came from.

    Attributes:
        batch_size: Examples per optimizer step, B.
        eta_l: Learning rate times smoothness.
        n_prompts: Prompts behind the estimate.
        n_examples: Examples behind the estimate.
        reference_point: Whether mu was taken to be ``E g_t`` (no marginal gradients given).
        summary: The moments, for curves, verdicts, error tables and layers.
    """

    batch_size: float
    eta_l: float
    n_prompts: int
    n_examples: int
    reference_point: bool
    summary: MomentSummary = field(repr=False)

    @property
    def tau(self) -> float:
        """``eta L / B``."""
        return noise_scale(self.batch_size, self.eta_l)

    @property
    def estimates(self) -> Estimates:
        """Bias and variance parts over the whole sample (scalars)."""
        return estimates(self.summary).select(0)

    def __str__(self) -> str:
        return f"alpha* = {super().__str__()} at batch size {self.batch_size:g}, eta L = {self.eta_l:g}"


def alpha_from_summary(
    summary: MomentSummary,
    *,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
) -> AlphaStar:
    """alpha* from streamed moments; see `alpha_from_gradients`."""
    tau = noise_scale(batch_size, eta_l)
    ratio = LinearRatio.alpha(summary, tau)
    interval = alpha_interval(ratio, summary, level)
    return AlphaStar(
        **vars(interval),
        batch_size=batch_size,
        eta_l=eta_l,
        n_prompts=summary.n_prompts,
        n_examples=summary.n_examples,
        reference_point=summary.reference_point,
        summary=summary,
    )


def alpha_from_gradients(
    t: Float[np.ndarray, "examples parameters"],
    e: Float[np.ndarray, "examples parameters"],
    m: Float[np.ndarray, "examples parameters"] | None = None,
    *,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
    blocks: Mapping[str, slice] | None = None,
) -> AlphaStar:
    """Optimal weight of the trace gradient in ``alpha g_t + (1 - alpha) g_e``, with a confidence interval.

    Args:
        t: Trace gradients, ``[N, d]``, one row per example.
        e: Empty-trace gradients of the same examples.
        m: Unbiased estimates of the marginal gradients of the same examples (they may share the traces of ``t``); None
            at the reference point with untruncated traces at temperature 1, where ``E g_t = mu``.
        batch_size: Examples per optimizer step: alpha* belongs to one batch size. 1 is Theorem 2 as printed.
        eta_l: Learning rate times smoothness; 1 is Theorem 4 as printed.
        level: Confidence level.
        clusters: Prompt of each example, where prompts have several pairs; None if all differ.
        blocks: Name to slice of the parameters, for per-layer weights afterwards.

    Returns:
        The weight, its interval and the moments behind both.

    Raises:
        UserError: Shapes disagree, fewer than three prompts, or a level, batch size or step size out of range.

    Source: Theorem 2 and Theorem 4 of the paper; U-statistics and the leave-one-prompt-out jackknife for the rest.

    Example:
        A noisy unbiased trace gradient beside an exact but biased empty-trace gradient, in two dimensions, with
        ``norm(b_e)^2 = 1`` and ``tr Sigma_t = 2``: ``alpha_unc = (1 + 0) / (1 + 2 / B)``.

        >>> rng = np.random.default_rng(0)
        >>> mu = np.array([1.0, 0.0])
        >>> t = mu + rng.normal(size=(4000, 2))
        >>> e = np.zeros((4000, 2))
        >>> m = np.tile(mu, (4000, 1))
        >>> print(alpha_from_gradients(t, e, m))
        alpha* = 0.3... [0.3..., 0.3...] at batch size 1, eta L = 1
        >>> print(alpha_from_gradients(t, e, m, batch_size=128))
        alpha* = 0.98... [0.9..., ...] at batch size 128, eta L = 1
    """
    given = {"t": t, "e": e} if m is None else {"t": t, "e": e, "m": m}
    vectors = {name: example_rows(name, value) for name, value in given.items()}
    summary = summary_of_arrays(vectors, clusters=clusters, blocks=blocks)
    return alpha_from_summary(summary, batch_size=batch_size, eta_l=eta_l, level=level)


@dataclass(frozen=True)
class AlphaCurve:
    """alpha* at several batch sizes with a pointwise confidence band; every array is ``[batch sizes]``."""

    batch_size: Array
    eta_l: float
    level: float
    alpha: Array
    unclipped: Array
    low: Array
    high: Array
    identified: Mask
    n_eff: Array
    largest: Array


def alpha_curve(
    summary: MomentSummary,
    batch_sizes: Sequence[float] | Array,
    *,
    eta_l: float = 1.0,
    level: float = 0.95,
) -> AlphaCurve:
    """``alpha(tau) = (P0 + tau P1) / (Q0 + tau Q1)`` at ``tau = eta L / B`` for each batch size B.

    The curve is monotone in B: a weighted average of the bias-only limit (weight ``Q0``) and the variance-only limit
    (weight ``tau Q1``) of `alpha_limits`.
    """
    taus = np.array([noise_scale(B, eta_l) for B in batch_sizes])[:, None]
    found = LinearRatio.of(summary, lambda p: (p.P0 + taus * p.P1, p.Q0 + taus * p.Q1))
    numerator, denominator = found.numerator, found.denominator
    sets = ratio_sets(found, level)
    low, high, identified = sets.clipped()
    return AlphaCurve(
        batch_size=np.asarray(batch_sizes, dtype=np.float64),
        eta_l=eta_l,
        level=level,
        alpha=minimiser(numerator[:, 0], denominator[:, 0]),
        unclipped=sets.ratio,
        low=low,
        high=high,
        identified=identified,
        n_eff=sets.n_eff,
        largest=sets.largest,
    )


@dataclass(frozen=True)
class AlphaLimits:
    """The two ends of the curve.

    Attributes:
        bias_only: ``P0 / Q0``, the limit of large batches (only biases matter).
        variance_only: ``P1 / Q1 = tr(Sigma_e - Sigma_te) / tr(Sigma_t + Sigma_e - 2 Sigma_te)``, the limit of small
            batches; it needs no marginal gradient and is what remains, as ``alpha_var``, where mu cannot be had.
    """

    bias_only: AlphaInterval
    variance_only: AlphaInterval


def alpha_limits(summary: MomentSummary, *, level: float = 0.95) -> AlphaLimits:
    """Bias-only and variance-only limits of alpha with their intervals."""
    bias, variance = (LinearRatio.of(summary, pick) for pick in (lambda p: (p.P0, p.Q0), lambda p: (p.P1, p.Q1)))
    return AlphaLimits(
        bias_only=alpha_interval(bias, summary, level),
        variance_only=alpha_interval(variance, summary, level),
    )


def alpha_j(
    summary: MomentSummary,
    rho: float,
    *,
    batch_size: float = 1.0,
    level: float = 0.95,
) -> AlphaInterval:
    """Minimiser of the descent bound for ``rho = eta L < 1`` with no term dropped (`Estimates.alpha_j_parts`).

    Raises:
        UserError: rho outside (0, 1].
    """
    ratio = LinearRatio.of(summary, lambda parts: parts.alpha_j_parts(rho, batch_size))
    return alpha_interval(ratio, summary, level)


def error_curve(
    summary: MomentSummary, alphas: Sequence[float] | Array, *, tau: float = 1.0, level: float = 0.95
) -> SimpleInterval:
    """The parabola ``norm(bias)^2 + tau Var`` of the mix over alpha with a pointwise band; arrays ``[alphas]``."""
    values = estimates(summary).error(np.asarray(alphas, dtype=np.float64)[:, None], tau)
    return jackknife_normal(values, summary.group_sizes, level, floor=0.0)


@dataclass(frozen=True)
class LayerAlphas:
    """alpha of every parameter block and what is gained over one alpha for all.

    Attributes:
        alphas: Block name to weight with interval.
        weights: Block name to ``A_l``, the curvature of its error parabola (its say in the global alpha).
        gain: ``sum_l A_l (alpha_l - alpha)^2 = sum_l B_l^2 / A_l - B^2 / A``, the error saved by unclipped per-layer
            weights, freed of its bias of order 1/N by the jackknife; None where some A_l is not positive. It cannot be
            negative, but its estimate can; then the interval reaches below zero, so that it holds the estimate.
    """

    alphas: dict[str, AlphaInterval]
    weights: dict[str, float]
    gain: SimpleInterval | None


def layer_alphas(
    summary: MomentSummary,
    *,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
) -> LayerAlphas:
    """Per-layer weights: the error separates over parameter blocks, so each has its own ``alpha_l = B_l / A_l``."""
    tau = noise_scale(batch_size, eta_l)
    found = LinearRatio.alpha(summary, tau, per_block=True)
    B, A = found.numerator, found.denominator
    alphas = {name: alpha_interval(found.block(k), summary, level) for k, name in enumerate(summary.blocks)}
    # A block that never gets a gradient (LoRA's A at its start) has A_l = B_l = 0 and no part in the gain.
    live = ~((A == 0) & (B == 0)).all(axis=0)
    gain = None
    if live.any() and (A[:, live] > 0).all():
        saved = (B[:, live] ** 2 / A[:, live]).sum(axis=1) - B.sum(axis=1) ** 2 / A.sum(axis=1)
        value, error = jackknife_corrected(saved, summary.group_sizes)
        half = t_quantile(level, summary.n_groups) * error
        gain = SimpleInterval(value, error, value - half, value + half, level)
    return LayerAlphas(alphas, {name: float(A[0, k]) for k, name in enumerate(summary.blocks)}, gain)


def adam_metric(second_moment: Float[np.ndarray, " parameters"], epsilon: float = 1e-8) -> Array:
    """Diagonal of Adam's metric, ``P = 1 / (sqrt(v) + epsilon)``, from its frozen second-moment estimate v."""
    v = np.asarray(second_moment, dtype=np.float64)
    if (v < 0).any() or not np.isfinite(v).all():
        raise UserError("Adam's second moments must be finite and not negative; check the optimizer state.")
    return 1 / (np.sqrt(v) + epsilon)


def in_metric(
    vectors: Mapping[str, Float[np.ndarray, "examples parameters"]], metric: Float[np.ndarray, " parameters"]
) -> dict[str, Array]:
    """Scale per-example gradients by ``sqrt(P)``, so that plain moments of the result are moments in the metric P.

    ``alpha_P = E <e - t, P (e - mu)> / E norm(e - t)_P^2`` is then the ordinary alpha of what is returned.
    """
    scale = np.sqrt(np.asarray(metric, dtype=np.float64))
    return {name: np.asarray(value, dtype=np.float64) * scale for name, value in vectors.items()}


def direction_alpha(
    summary: MomentSummary,
    *,
    batch_size: float = 1.0,
    level: float = 0.95,
) -> AlphaInterval:
    """Weight for optimizers that ignore the length of the gradient, as Adam does.

    The combination ``c_t g_t + c_e g_e`` nearest to mu, its length free, has ``c = M^-1 v`` with ``v_i = E g_i . mu``
    and ``M_ij = E g_i . E g_j + tr Sigma_ij / B``; only its direction matters, ``alpha = c_t / (c_t + c_e)``. The
    determinant of M cancels: ``c_t ~ v_t M_ee - v_e M_te`` and ``c_e ~ v_e M_tt - v_t M_te``. (Products of U-statistics
    have a bias of order 1/N, which numerator and denominator of the other weights do not.)
    """
    return alpha_interval(direction_ratio(summary, batch_size), summary, level)


def direction_ratio(summary: MomentSummary, batch_size: float) -> LinearRatio:
    """``c_t / (c_t + c_e)`` of `direction_alpha`."""
    tau = noise_scale(batch_size)  # the length is free, so eta L cancels

    def shares(p: Estimates) -> tuple[Array, Array]:
        tt, ee = p.trace_sq + tau * p.var_trace, p.empty_sq + tau * p.var_empty
        te = p.trace_dot_empty + tau * p.var_cross
        top = p.trace_dot_marginal * ee - p.empty_dot_marginal * te
        other = p.empty_dot_marginal * tt - p.trace_dot_marginal * te
        return top, top + other

    return LinearRatio.of(summary, shares, linear=False)


def curvature_alpha(
    summary: MomentSummary,
    eta: float,
    *,
    batch_size: float = 1.0,
    level: float = 0.95,
) -> AlphaInterval:
    """Minimiser of the expected loss after one step to second order, with the Hessian H of the loss in place of L.

    With ``h = E t - E e`` and covariances of single examples,

        alpha_H = [mu.h / eta - E e' H h - tr(H Cov(e, t - e)) / B] / [h' H h + tr(H Cov(t - e)) / B].

    ``H = L I`` gives alpha_J at ``rho = eta L``. Where H is so indefinite that the denominator is not positive there is
    no minimum, and the interval says "not identified".

    Args:
        summary: Moments of the members ``t, e, m, Ht, He``, the last two being ``H t_i`` and ``H e_i``.
        eta: Learning rate.
        batch_size: Examples per step.
        level: Confidence level.
    """
    if not eta > 0:
        raise UserError(f"the learning rate must be positive, got {eta}.")
    t, e, m, Ht, He = (summary.index(name) for name in ("t", "e", "m", "Ht", "He"))
    tau = noise_scale(batch_size)

    def ratio(moments: MomentSummary) -> LinearRatio:
        absolute = (moments.U + moments.shift).sum(axis=-3)
        mixed = absolute + tau * moments.covariance.sum(axis=-3)
        marginal_dot_h = absolute[..., m, t] - absolute[..., m, e]
        numerator = marginal_dot_h / eta - (mixed[..., e, Ht] - mixed[..., e, He])
        denominator = mixed[..., t, Ht] - mixed[..., t, He] - mixed[..., e, Ht] + mixed[..., e, He]
        return LinearRatio(numerator, denominator, moments.group_sizes)

    alone = None if summary.prompts is None else ratio(summary.prompts)
    return alpha_interval(replace(ratio(summary), alone=alone, norms=prompt_norms(summary)), summary, level)


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
    summary: MomentSummary,
    alpha: float,
    *,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
) -> FixedAlphaVerdict:
    """Test a fixed alpha in (0, 1) against both parts.

    With ``E(a) - E(alpha_unc) = A (a - alpha_unc)^2``, the mix beats g_t iff ``alpha_unc < (1 + alpha) / 2`` and beats
    g_e iff ``alpha_unc > alpha / 2``: it beats both iff alpha lies in ``(2 alpha_unc - 1, 2 alpha_unc)``, not "for any
    nontrivial mixture". Each is decided where the confidence set of alpha_unc, the one that comes with alpha*, does not
    hold the bound in question.

    Raises:
        UserError: alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise UserError(f"a mixture needs alpha strictly between 0 and 1, got {alpha}.")
    tau = noise_scale(batch_size, eta_l)
    ratio = LinearRatio.alpha(summary, tau)
    B, A = float(ratio.numerator[0]), float(ratio.denominator[0])
    sets = ratio_sets(ratio, level)

    def below(bound: float) -> Answer:
        """Whether alpha_unc lies below the bound."""
        if sets.contains(bound):
            return "undecided"
        return "yes" if bound * A > B else "no"

    opposite: dict[Answer, Answer] = {"yes": "no", "no": "yes", "undecided": "undecided"}
    answers = below((1 + alpha) / 2), opposite[below(alpha / 2)]
    with np.errstate(invalid="ignore", divide="ignore"):
        unclipped = float(np.divide(B, A))
    return FixedAlphaVerdict(alpha, *answers, 2 * unclipped - 1, 2 * unclipped, level, batch_size, eta_l)


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
    return alpha_interval(LinearRatio.of_rows(parts.var_trace_sampling, parts.var_trace, summary), summary, level)


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
    sets = ratio_sets(LinearRatio.of_rows(parts.within_empty, parts.within_trace, summary), level)
    threshold = (1 + alpha) / (1 - alpha)
    contrast = jackknife_normal(parts.within_empty - threshold * parts.within_trace, summary.group_sizes, level)
    holds: Answer = "yes" if contrast.high < 0 else "no" if contrast.low > 0 else "undecided"
    return ConditionalVarianceRatio(sets, alpha, threshold, holds)


@dataclass(frozen=True)
class HalfSplit:
    """Unclipped alpha with mu from one half of the traces, against the other half.

    Attributes:
        difference: Of the two.
        low: Lower end of its interval.
        high: Upper end.
        agrees: Whether the interval holds zero.
    """

    difference: float
    low: float
    high: float
    agrees: bool


def half_split(
    summary: MomentSummary,
    halves: MomentSummary,
    *,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
) -> HalfSplit:
    """Compares alpha with mu from either half of the traces.

    mu enters alpha through ``h . mu`` alone, h = E t - E e, and linearly, so the two differ by

        alpha_1 - alpha_2 = h . E(m1 - m2) / A,

    a U-statistic of the members ``h`` (t - e) and ``d`` (m1 - m2) over A. The interval is the jackknife's for the
    numerator; whether it holds zero does not depend on A.

    Two halves of K/2 traces have the same bias, so agreement does not prove its absence; disagreement proves that the
    halves differ by more than the prompts explain, as collapsed weights do.

    Args:
        summary: Moments of ``t`` and ``e``, for A.
        halves: Moments of ``h`` and ``d`` over the same examples; fewer groups will do.
        batch_size: Examples per optimizer step.
        eta_l: Learning rate times smoothness.
        level: Confidence level.
    """
    h, d = halves.index("h"), halves.index("d")
    products = (halves.U + halves.shift)[..., h, d].sum(axis=-1)
    A = float(estimates(summary).denominator(noise_scale(batch_size, eta_l))[0])
    error = float(np.sqrt(jackknife_covariance(products[None], halves.group_sizes)[0, 0]))
    q = t_quantile(level, halves.n_groups)
    ends = sorted((float(products[0]) + side * q * error) / A for side in (-1, 1))
    return HalfSplit(float(products[0]) / A, ends[0], ends[1], ends[0] <= 0 <= ends[1])
