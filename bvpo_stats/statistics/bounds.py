r"""An interval of alpha where mu is unknown but theta has moved little from theta_ref: a bound on g_t's bias.

With ``h = E t - E e``, ``b_e = b_t - h``, so of the whole vector ``b_t`` Theorem 2 needs one number, ``h . b_t``:

    alpha_unc = (norm(h)^2 + tau P1 - h . b_t) / (norm(h)^2 + tau Q1).

All else is estimated from t and e. For DPO pairs sampled from pi_ref at temperature 1, write ``a = h . s(r, y)`` for a
score along h, ``D = log pi_theta(r, y) / pi_ref(r, y)`` for the log-ratio, ``u = sigma(-m_t)`` and ``U = sigma(-M)``.
Given (x, y+, y-), the weights of theta's posterior against pi_ref's are ``w = e^D / E e^D``, and exactly

    h . b_t(z) = beta [Cov(U w - u, a) over r+] + beta [Cov(u - U w, a) over r-] - beta (E u - U) (E a+ - E a-).

To first order in the drift this is the drift law ``h . [(beta/2)(C+ - C-) delta + (beta^2/4)(C+ + C-) delta]``, since
``C delta = Cov(s, D)``. One trace per answer does not give a covariance given the answer, but bounds it:

- ``Cov(f(D), a) <= Lip(f) sd(D) sd(a)``, and by Cauchy-Schwarz over the pairs, ``E[sd sd] <= sqrt(E Var E Var)``;
- the variance given the answer is at most the variance over all pairs, ``E Var(D | y) <= Var(D)``, likewise for a;
- with every ``|D| <= L``: ``U`` lies in sigma(-+ 2 beta L) and ``w <= e^(2L)``, which gives the slopes of `slopes`;
- ``|E u - U| <= beta (e^(2L)/8 + beta/20) (Var D+ + Var D-)``, of second order.

So the bound holds for any drift for which L is the largest log-ratio, not only to first order; what is estimated in it
is L (the largest seen) and four variances. It is loose by the share of those variances that lies between answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.estimates import LinearRatio, noise_scale
from bvpo_stats.statistics.intervals import jackknife_covariance, ratio_sets, t_quantile
from bvpo_stats.statistics.moments import Array, MomentSummary


@dataclass(frozen=True)
class DriftBound:
    """A bound R on ``norm(h . b_t)``.

    Attributes:
        value: R with estimated variances.
        high: Upper end of its one-sided confidence interval (jackknife over prompts).
        level: Level of that end.
        largest: L, the largest absolute log-ratio seen, in nats.
        n_prompts: Prompts behind it.
    """

    value: float
    high: float
    level: float
    largest: float
    n_prompts: int


@dataclass(frozen=True)
class AlphaRange:
    """Where alpha* may lie, whatever g_t's bias is within its bound. This is no estimate of alpha*: it has no centre.

    Attributes:
        low: Lower end, clipped to [0, 1].
        high: Upper end, clipped.
        level: Confidence level, of moments and bound together.
        informative: Whether the range is less than all of [0, 1].
        bias_bound: R, the bound on ``norm(h . b_t)`` that was used (its upper end).
        largest_log_ratio: L, in nats.
        n_prompts: Prompts behind the bound.
    """

    low: float
    high: float
    level: float
    informative: bool
    bias_bound: float
    largest_log_ratio: float
    n_prompts: int


def slopes(beta: float, largest: float) -> tuple[float, float]:
    """Largest slopes of ``U w - u`` in D+ and of ``u - U w`` in D-, for log-ratios up to ``largest``.

    They tend to ``1/2 + beta/4`` and ``norm(1/2 - beta/4)``, the factors of the drift law over beta.

    >>> slopes(1.0, 0.0)
    (0.75, 0.25)
    """
    most, grow = 1 / (1 + math.exp(-2 * beta * largest)), math.exp(2 * largest)
    least = 1 - most
    flattest = beta * most * least  # smallest slope of u
    chosen = most * grow + beta / 4
    rejected = max(most * grow - flattest, beta / 4 - least / grow)
    return chosen, rejected


def drift_bound(
    log_ratios: Float[np.ndarray, "prompts 2"],
    projections: Float[np.ndarray, "prompts 2"],
    beta: float,
    level: float = 0.975,
) -> DriftBound:
    """Bounds ``norm(h . b_t)`` from one trace per answer.

    Args:
        log_ratios: ``log pi_theta / pi_ref`` of the chosen and the rejected response of every D_t pair.
        projections: ``h . s`` of the same. With an estimated h they scatter more than with the true one, which errs on
            the safe side.
        beta: Of the DPO loss.
        level: One-sided confidence level of the upper end.

    Raises:
        UserError: Fewer than three pairs, or numbers that are not finite.
    """
    D, a = np.asarray(log_ratios, dtype=np.float64), np.asarray(projections, dtype=np.float64)
    n = len(D)
    if n < 3:
        raise UserError(f"the bound on g_t's bias needs at least three D_t pairs, got {n}.")
    if not (np.isfinite(D).all() and np.isfinite(a).all()):
        raise UserError("a log-ratio or a projected score is not finite; check the stored log-probabilities.")
    largest = float(np.abs(D).max())
    centred = [D - D.mean(axis=0), a - a.mean(axis=0)]  # keeps digits; variances do not notice
    difference = a[:, :1] - a[:, 1:]
    columns = np.concatenate([*centred, *(x**2 for x in centred), difference**2], axis=1)
    total = columns.sum(axis=0)
    means = np.vstack([total / n, (total - columns) / (n - 1)])
    sizes = np.array([n, *[n - 1] * n], dtype=np.float64)[:, None]
    variances = np.maximum(means[:, 4:8] - means[:, :4] ** 2, 0) * sizes / (sizes - 1)
    var_d, var_a = variances[:, :2], variances[:, 2:]
    # E[(Var D+ + Var D-)^2] <= 2 L^2 E[Var D+ + Var D-], as a variance within [-L, L] is at most L^2.
    second_order = beta * (math.exp(2 * largest) / 8 + beta / 20) * math.sqrt(2) * largest
    rows = beta * (
        np.sqrt(var_d * var_a) @ np.array(slopes(beta, largest))
        + second_order * np.sqrt(var_d.sum(axis=1) * means[:, 8])
    )
    error = math.sqrt(jackknife_covariance(rows[None], np.ones(n))[0, 0])
    q = t_quantile(2 * level - 1, n)
    return DriftBound(float(rows[0]), float(rows[0] + q * error), level, largest, n)


def alpha_range(
    summary: MomentSummary,
    bound: DriftBound,
    *,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
) -> AlphaRange:
    """The hull of the confidence sets of alpha over all ``h . b_t`` within the bound.

    Half of the error probability is the moments', half the bound's (give `drift_bound` the level ``(1 + level) / 2``).

    Args:
        summary: Moments of ``t`` and ``e`` alone.
        bound: R.
        batch_size: Examples per optimizer step.
        eta_l: Learning rate times smoothness.
        level: Confidence level.
    """
    tau = noise_scale(batch_size, eta_l)
    found = LinearRatio.alpha(summary, tau, marginal="t")

    def ends(shift: float) -> tuple[Array, Array]:
        sets = ratio_sets(replace(found, numerator=found.numerator + shift), (1 + level) / 2)
        return sets.clipped()[:2]

    low, high = float(ends(-bound.high)[0]), float(ends(bound.high)[1])
    return AlphaRange(
        low=low,
        high=high,
        level=level,
        informative=low > 0 or high < 1,
        bias_bound=bound.high,
        largest_log_ratio=bound.largest,
        n_prompts=bound.n_prompts,
    )
