"""The optimal mixing weight alpha* of Theorem 2 with an honest interval, for a given batch size and step size.

    alpha_unc = (P0 + tau P1) / (Q0 + tau Q1),   tau = eta L / B,   alpha* = clip(alpha_unc, 0, 1)

`alpha_star` is the one call for arrays of per-example gradients; `alpha_from_summary` does the same from streamed
moments.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from bvpo_stats.statistics.arrays import summary_of_arrays
from bvpo_stats.statistics.estimates import Estimates, LinearRatio, estimates, noise_scale
from bvpo_stats.statistics.intervals import BOUNDED, COMPLEMENT, Method, ratio_sets
from bvpo_stats.statistics.prompts_needed import PromptsNeeded, prompts_needed
from bvpo_stats.statistics.summary import Array, MomentSummary

SetShape = Literal["bounded", "complement", "whole"]


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
        unclipped_low: Lower end of the set before clipping; the set is ``[low, high]`` if bounded, ``(-inf, low] or
            [high, inf)`` if a complement, everything if whole.
        unclipped_high: Upper end likewise.
        shape: Which of the three.
        method: ``fieller``, ``hall`` or ``delta``.
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
    shape: SetShape
    method: Method
    needed: PromptsNeeded | None

    def __str__(self) -> str:
        if self.identified:
            return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
        if self.needed is None or self.needed.prompts is None:
            return "not identified"
        return (
            f"not identified ({'at least' if self.needed.at_least else 'about'} {self.needed.prompts} prompts needed)"
        )


def minimiser(numerator: Array | float, denominator: Array | float) -> Array:
    """Point of [0, 1] where ``A a^2 - 2 B a`` is least: ``clip(B / A)`` for A > 0, else the better end.

    An unbiased estimate of A can be negative at small tau; then the estimated parabola opens downwards.

    >>> minimiser([0.3, 2.0, 0.1, 0.1], [1.0, 1.0, -1.0, 0.3])
    array([0.3       , 1.        , 1.        , 0.33333333])
    """
    B, A = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = np.clip(B / A, 0.0, 1.0)
    value = np.where(A > 0, inside, np.where(A - 2 * B < 0, 1.0, 0.0))
    return np.where((A == 0) & (B == 0), np.nan, value)


def alpha_interval(
    ratio: LinearRatio, summary: MomentSummary, level: float = 0.95, method: Method = "fieller"
) -> AlphaInterval:
    """Interval of any weight that is a ratio of two statistics, arrays ``[1 + G]``."""
    numerator, denominator = ratio.numerator, ratio.denominator
    sets = ratio_sets(numerator, denominator, summary.group_sizes, level, method, ratio.interactions)
    low, high, identified = sets.clipped()
    needed = None
    if not identified:
        needed = prompts_needed(numerator, denominator, summary.group_sizes, summary.n_prompts, level)
        if needed.prompts == summary.n_prompts:  # the extrapolation, plain Fieller, is satisfied; the set is not
            needed = PromptsNeeded(summary.n_prompts + 1, True)
    shape: SetShape = "bounded" if sets.shape == BOUNDED else "complement" if sets.shape == COMPLEMENT else "whole"
    return AlphaInterval(
        value=float(minimiser(numerator[0], denominator[0])),
        low=float(low),
        high=float(high),
        level=level,
        unclipped=float(sets.ratio),
        identified=bool(identified),
        unclipped_low=float(sets.low),
        unclipped_high=float(sets.high),
        shape=shape,
        method=method,
        needed=needed,
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
    method: Method = "fieller",
) -> AlphaStar:
    """alpha* from streamed moments; see `alpha_star`."""
    tau = noise_scale(batch_size, eta_l)
    ratio = LinearRatio.of(summary, lambda parts: (parts.numerator(tau), parts.denominator(tau)))
    interval = alpha_interval(ratio, summary, level, method)
    return AlphaStar(
        **vars(interval),
        batch_size=batch_size,
        eta_l=eta_l,
        n_prompts=summary.n_prompts,
        n_examples=summary.n_examples,
        reference_point=summary.reference_point,
        summary=summary,
    )


def alpha_star(
    t: Float[np.ndarray, "examples parameters"],
    e: Float[np.ndarray, "examples parameters"],
    m: Float[np.ndarray, "examples parameters"] | None = None,
    *,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
    blocks: Mapping[str, slice] | None = None,
    method: Method = "fieller",
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
        method: ``fieller`` (default), ``hall`` (cautious under heavy tails) or ``delta``.

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
        >>> print(alpha_star(t, e, m))
        alpha* = 0.3... [0.3..., 0.3...] at batch size 1, eta L = 1
        >>> print(alpha_star(t, e, m, batch_size=128))
        alpha* = 0.98... [0.9..., ...] at batch size 128, eta L = 1
    """
    vectors = {"t": t, "e": e} if m is None else {"t": t, "e": e, "m": m}
    summary = summary_of_arrays(vectors, clusters=clusters, blocks=blocks)
    return alpha_from_summary(summary, batch_size=batch_size, eta_l=eta_l, level=level, method=method)
