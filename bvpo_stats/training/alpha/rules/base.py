"""What rules for alpha share: the estimates they see, and a ratio of estimates shrunk toward the prior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from scipy import stats

from bvpo_stats.statistics.intervals import Tails, fieller_sets
from bvpo_stats.statistics.moments import Array

SPREAD = 0.25
"""s, standard deviation of alpha about the prior before anything is known."""

MIN_PRODUCTS = 2
"""Lagged products without which they have no spread."""


@dataclass(frozen=True)
class Parts:
    """Moments of the gradients in the optimizer's metric; arrays with any leading axes.

    Attributes:
        h_sq: norm(h)^2, h = E g_t - E g_e.
        e_h: E g_e . h.
        e_sq: norm(E g_e)^2 (0 where the rule does not ask for it).
        P1: tr(Sigma_e - Sigma_te) of single prompts.
        Q1: tr(Sigma_t + Sigma_e - 2 Sigma_te).
        var_e: tr Sigma_e.
        c_h: c . h, c = E g_t - mu.
        c_e: c . E g_e.
    """

    h_sq: Array
    e_h: Array
    e_sq: Array
    P1: Array
    Q1: Array
    var_e: Array
    c_h: Array
    c_e: Array

    @classmethod
    def of(cls, statistics: Array, batch: float) -> Parts:
        """From ``[..., 8]``: `WITHIN`, `LAGGED`, c . h and c . e."""
        hh, eh, ee, lag_hh, lag_eh, lag_ee, c_h, c_e = np.moveaxis(statistics, -1, 0)
        return cls(
            lag_hh, lag_eh, lag_ee, batch * (lag_eh - eh), batch * (hh - lag_hh), batch * (ee - lag_ee), c_h, c_e
        )


Ratio = Callable[[Parts], tuple[Array, Array]]
"""Numerator and denominator of an alpha, from parts ``[..., 1]``: settings of a run broadcast over the last axis."""


@dataclass(frozen=True)
class Seen:
    """All that a rule may look at.

    Attributes:
        statistics: ``[..., 8]``, see `Parts.of`.
        covariance: ``[..., 8, 8]``, of these, for decisions.
        widest: The same for intervals, which must not be too short where signal rules (`SHARED_AT_MOST`).
        effective: Effective number of steps behind them.
        products: Steps with lagged products.
        batch: Prompts a step in the averages.
        batch_size: B of the step to come.
        eta_l: eta L of the step to come; ``[...]``.
        progress: Share of the run that is over before the step to come, in [0, 1]; None where its length is unknown.
        prior: alpha before anything is known.
        alpha: The alpha of the step just done, ``[...]``.
        latest: ``[..., 6]``, products of the step just done; None where it had no lagged ones.
        influences: ``[..., K, 6]``, of the last steps on the first six statistics; None where they are not known.
        shares: ``[K]``, of these steps in the averages.
        sizes: ``[..., K]``, norm(h_k)^2 of these steps.
    """

    statistics: Array
    covariance: Array
    widest: Array
    effective: float
    products: int
    batch: float
    batch_size: float
    eta_l: Array
    progress: float | None
    prior: float
    alpha: Array
    latest: Array | None
    influences: Array | None = None
    shares: Array | None = None
    sizes: Array | None = None


@dataclass(frozen=True)
class Decision:
    """What a rule says; arrays with the leading axes of what it saw.

    Attributes:
        alpha: Of the next step.
        estimate: The rule's ratio before shrinkage, unclipped; None where it has none.
        low: Lower end of its interval, clipped to [0, 1].
        high: Upper end.
        known: Whether anything was estimated.
        n_eff: Effective steps behind the estimate, as effective prompts are of `bvpo_stats.statistics.intervals`.
        largest: The largest step's share of its variance.
    """

    alpha: Array
    estimate: Array | None = None
    low: Array | None = None
    high: Array | None = None
    known: bool = True
    n_eff: Array | None = None
    largest: Array | None = None


@runtime_checkable
class Rule(Protocol):
    """A rule for alpha."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def keeps_empty(self) -> bool:
        """Whether it needs norm(E g_e)^2, for which another vector is kept."""

    def decide(self, seen: Seen, level: float | None) -> Decision:
        """The alpha of the next step, with the interval of its estimate at a level, where one is given."""


def shrunk(seen: Seen, ratio: Ratio, level: float | None, prior: float) -> Decision:
    """A ratio n / A of estimates, decided by shrinkage toward the prior, with Fieller's set of the ratio beside it.

    With d = n - prior A, v = Var d and s = `SPREAD`, the posterior mean of alpha under a normal prior is

        alpha = clip(prior + (d / A) s^2 A^2 / (s^2 A^2 + v), 0, 1),

    so a noisy estimate moves alpha a little and a sharp one all the way: there is no threshold. norm(h)^2 is not let
    below 0 in A. v is estimated from n effective steps: it grows by (t_{n - 1} / z)^2, the quantiles at 97.5%, so that
    a normal interval with it is as long as Student's. After two products that is a factor of 42, so they say little.

    The set is that of every other alpha (`bvpo_stats.statistics.intervals`) with steps in the place of prompts:
    longer where larger steps than those seen would move it, and no interval where fewer than two effective steps rule.
    What it lacks: the corrections for interactions and skewness, which need single prompts. Instead the spread of the
    lagged products, which share an average, is taken `SHARED_AT_MOST` times.
    """
    if seen.products < MIN_PRODUCTS:
        return Decision(np.full(np.shape(seen.alpha), prior), known=False)

    def both(statistics: Array) -> Array:
        return np.stack(np.broadcast_arrays(*ratio(Parts.of(statistics, seen.batch))), axis=-1)

    y = seen.statistics
    scale = np.sqrt(np.maximum(np.einsum("...ii->...i", seen.covariance), 0)) + 1e-9 * np.abs(y) + 1e-300
    moves = scale[..., None, :] * np.eye(8)  # [..., 8 moves, 8]
    ahead, behind = both(y[..., None, :] + 1e-3 * moves), both(y[..., None, :] - 1e-3 * moves)
    slopes = (ahead - behind) / (2e-3 * scale[..., None])  # [..., 8, 2]
    n = max(seen.effective, 1.0 + 1e-9)
    few = (stats.t.ppf(0.975, max(n - 1, 1.0)) / stats.norm.ppf(0.975)) ** 2
    covariance, widest = (
        np.einsum("...ip,...ij,...jq->...pq", slopes, x, slopes)
        for x in (few * seen.covariance, (n + 1) / (n - 1) * seen.widest)
    )
    numerator, denominator = np.moveaxis(both(y[..., None, :])[..., 0, :], -1, 0)
    floored = y.copy()
    floored[..., 3] = np.maximum(y[..., 3], 0.0)
    A = both(floored[..., None, :])[..., 0, 1]
    d = numerator - prior * A
    v = covariance[..., 0, 0] - 2 * prior * covariance[..., 0, 1] + prior**2 * covariance[..., 1, 1]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        moved = d * SPREAD**2 * A / (SPREAD**2 * A**2 + np.maximum(v, 0.0))
        alpha = np.where((A > 0) & np.isfinite(moved), np.clip(prior + moved, 0.0, 1.0), prior)
    if level is None:
        return Decision(alpha, _ratio(numerator, denominator))
    q: Array = np.asarray(stats.t.ppf(0.5 + level / 2, max(n - 1, 1.0)))
    if seen.influences is None or seen.shares is None:
        low, high, _ = fieller_sets(numerator, denominator, widest, q).clipped()
        return Decision(alpha, _ratio(numerator, denominator), low, high)
    psi = np.einsum("...kp,...pq->...qk", seen.influences, slopes[..., :6, :])
    tails = Tails.of_influences(psi, _ratio(numerator, denominator), seen.shares, seen.sizes, level)
    # Where larger steps than those seen would move (B, A): the ends of a set move one way between here and there.
    moves = np.concatenate([np.zeros((*tails.moves.shape[:-2], 1, 2)), tails.moves], axis=-2)
    larger = (numerator[..., None] + moves[..., 0], denominator[..., None] + moves[..., 1])
    low, high, _ = fieller_sets(*larger, widest[..., None, :, :], q).clipped()
    enough = tails.enough()
    low, high = np.where(enough, low.min(axis=-1), 0.0), np.where(enough, high.max(axis=-1), 1.0)
    return Decision(
        alpha,
        _ratio(numerator, denominator),
        low,
        high,
        n_eff=np.asarray(tails.n_eff),
        largest=np.asarray(tails.largest),
    )


def _ratio(numerator: Array, denominator: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(numerator / denominator)
