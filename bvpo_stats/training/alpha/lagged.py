"""What training steps say of E g_t, E g_e and their noise: products of their means, with earlier ones above all.

With t_k, e_k the means of the trace and empty-trace gradients over the n_k prompts of step k, h_k = t_k - e_k, and
hbar_{<k} an average of the h_j of *earlier* steps, whose prompts are others,

    E h_k . hbar_{<k} = norm(h)^2           E norm(h_k)^2 = norm(h)^2 + Q1 / n_k
    E e_k . hbar_{<k} = E e . h             E e_k . h_k   = E e . h - P1 / n_k

with h = E g_t - E g_e, P1 = tr(Sigma_e - Sigma_te) and Q1 = tr Sigma of g_t - g_e. So one stored vector and four
products a step give all of Theorem 2 that does not need mu, up to the drift of theta; no gradient of a single prompt is
formed, and any weights will do. After K steps of B prompts a lagged product has an error of order 1 / (B K), an
average of within-step U-statistics one of order 1 / (B sqrt K). Products of a step with *itself* are never taken for
norm(h)^2.

All products are taken in the optimizer's metric, x' P y, P diagonal (`bvpo_stats.model.metric`).

**Window.** hbar forgets by `DECAY` a step, and begins anew with every epoch: a prompt must not meet its own earlier
gradient. An epoch of a single step has no earlier steps, so it says nothing of norm(h)^2.

Arrays may have leading axes (many runs at once); vectors may be numpy arrays or torch tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from bvpo_stats.statistics.moments import Array

DECAY = 0.98
"""What averages over steps keep from one step to the next."""

KEPT_STEPS = 200
"""Steps whose own products are kept, to see how few rule an average: older ones weigh less than 2% each."""

WITHIN, LAGGED = ("hh", "eh", "ee"), ("lag_hh", "lag_eh", "lag_ee")


@dataclass(frozen=True)
class StepProducts:
    """Products of one step's means; arrays of any one shape, a number each for a single run.

    Attributes:
        prompts: n_k.
        within: ``[..., 3]``: norm(h_k)^2, e_k . h_k, norm(e_k)^2.
        lagged: ``[..., 3]``: h_k . hbar, e_k . hbar, e_k . ebar; the last is 0 where ebar is not kept.
        behind: Prompts behind hbar, in effect; 0 where there is no earlier step and ``lagged`` says nothing.
    """

    prompts: float
    within: Array
    lagged: Array
    behind: float

    @property
    def usable(self) -> bool:
        """Whether all products are finite."""
        return bool(np.isfinite(self.within).all() and np.isfinite(self.lagged).all())


@dataclass(frozen=True)
class Lag:
    """Averages of the step means so far in the epoch, each prompt with weight ``DECAY`` to the power of its age.

    Attributes:
        h: hbar, ``[..., parameters]``; None before the first step of an epoch.
        e: ebar, likewise; None where the rule does not need it.
        weight: Sum of the weights.
        squares: Sum of their squares, over prompts.
        epoch: Number of the epoch.
    """

    h: Any = None
    e: Any = None
    weight: float = 0.0
    squares: float = 0.0
    epoch: int = -1

    @property
    def behind(self) -> float:
        """Prompts that count, in effect: (sum w)^2 / sum w^2."""
        return self.weight**2 / self.squares if self.squares else 0.0

    def of_epoch(self, epoch: int) -> Lag:
        """Itself within an epoch, empty in a new one."""
        return self if epoch == self.epoch else Lag(epoch=epoch)

    def products(self, prompts: float, h: Any, e: Any, metric: Any = None) -> StepProducts:
        """Products of a step with itself and with the earlier ones.

        Args:
            prompts: n_k.
            h: t_k - e_k, ``[..., parameters]``.
            e: e_k.
            metric: Diagonal of P, likewise; None for the identity.
        """
        ph, pe = (h, e) if metric is None else (metric * h, metric * e)
        none = dot(h, h) * 0.0
        within = (dot(ph, h), dot(pe, h), dot(pe, e))
        lagged = (none, none, none)
        if self.h is not None:
            lagged = (dot(ph, self.h), dot(pe, self.h), none if self.e is None else dot(pe, self.e))
        return StepProducts(prompts, np.stack(within, axis=-1), np.stack(lagged, axis=-1), self.behind)

    def add(self, prompts: float, h: Any, e: Any = None) -> Lag:
        """One more step. ``h`` and ``e`` may be taken over; ``e`` is None where ebar is not kept."""
        old, weight = DECAY * self.weight, DECAY * self.weight + prompts
        keep, new = old / weight, prompts / weight
        return Lag(
            h if self.h is None else keep * self.h + new * h,
            e if e is None or self.e is None else keep * self.e + new * e,
            weight,
            DECAY**2 * self.squares + prompts,
            self.epoch,
        )


def dot(x: Any, y: Any) -> Array:
    """Inner products over the last axis, summed in float64."""
    if isinstance(x, np.ndarray):
        return np.asarray(np.einsum("...d,...d->...", x, y), dtype=np.float64)
    return np.asarray((x * y).double().sum(-1).cpu().numpy())


@dataclass(frozen=True)
class ProductAverages:
    """Weighted averages of the products of all steps, and the covariance of these averages.

    A within-step product weighs with its prompts n_k, so that their average is norm(h)^2 + Q1 / n, n the mean batch; a
    lagged one with n_k times the prompts behind hbar, which for a plain average makes it the U-statistic over pairs of
    steps. The covariance is that of sums of independent terms (White 1980),

        v_ij = sum_k u_ik u_jk (y_ik - y_i)(y_jk - y_j) / (U_i U_j) * n / (n - 1),

    n the effective number of steps. Lagged products of one epoch share hbar, whose own error their spread does not
    show: where noise rules (norm(h)^2 below its error) they are uncorrelated all the same, where signal rules
    the variance of a U-statistic is up to `SHARED_AT_MOST` times the spread's.

    Attributes:
        weights: U, ``[6]``: sums of the weights of `WITHIN` and `LAGGED`.
        sums: ``[..., 6]``, weighted sums.
        cross: ``[..., 6, 6]``, sums of u y (u y)'.
        mixed: ``[..., 6, 6]``, sums of u y u'.
        squares: ``[6, 6]``, sums of u u'.
        steps: Sum of the weights of steps, for the mean batch.
        products: Steps with lagged products so far.
        recent: ``[..., K, 6]``, products of the last K steps, at most `KEPT_STEPS`.
        recent_weights: ``[K, 6]``, their weights when they came.
    """

    weights: Array
    sums: Array
    cross: Array
    mixed: Array
    squares: Array
    steps: float = 0.0
    products: int = 0
    recent: Array | None = None
    recent_weights: Array | None = None

    @classmethod
    def empty(cls, shape: tuple[int, ...] = ()) -> ProductAverages:
        """Nothing seen yet."""
        return cls(
            np.zeros(6), np.zeros((*shape, 6)), np.zeros((*shape, 6, 6)), np.zeros((*shape, 6, 6)), np.zeros((6, 6))
        )

    def add(self, step: StepProducts) -> ProductAverages:
        """One more step."""
        within, lagged = step.prompts, step.prompts * step.behind
        u = np.array([within] * 3 + [lagged] * 3)
        products = np.concatenate([step.within, step.lagged], axis=-1)
        y = products * u
        recent, weights = products[..., None, :], u[None]
        if self.recent is not None and self.recent_weights is not None:
            recent = np.concatenate([self.recent, recent], axis=-2)[..., -KEPT_STEPS:, :]
            weights = np.concatenate([self.recent_weights, weights])[-KEPT_STEPS:]
        return ProductAverages(
            DECAY * self.weights + u,
            DECAY * self.sums + y,
            DECAY**2 * self.cross + y[..., :, None] * y[..., None, :],
            DECAY**2 * self.mixed + y[..., :, None] * u,
            DECAY**2 * self.squares + u[:, None] * u,
            DECAY * self.steps + 1.0,
            self.products + (step.behind > 0),
            recent,
            weights,
        )

    @property
    def shares(self) -> Array | None:
        """Of the last K steps in `mean`, ``[K, 6]``; None where nothing was seen."""
        if self.recent_weights is None:
            return None
        age = np.arange(len(self.recent_weights))[::-1, None]
        return np.asarray(DECAY**age * self.recent_weights / np.where(self.weights > 0, self.weights, 1.0))

    @property
    def influences(self) -> Array | None:
        """Of the last K steps on `mean`, ``[..., K, 6]``: ``u_k (y_k - y) / U``; None where nothing was seen."""
        if self.recent is None or self.shares is None:
            return None
        return np.asarray(self.shares * (self.recent - self.mean[..., None, :]))

    @property
    def batch(self) -> float:
        """Mean number of prompts a step."""
        return float(self.weights[0] / self.steps)

    @property
    def mean(self) -> Array:
        """``[..., 6]``; 0 where nothing is known."""
        return self.sums / np.where(self.weights > 0, self.weights, 1.0)

    def covariance(self, shared: float) -> Array:
        """Of `mean`, ``[..., 6, 6]``, the lagged part's spread taken ``shared`` times (`SHARED`, `SHARED_AT_MOST`)."""
        m, u = self.mean, np.where(self.weights > 0, self.weights, 1.0)
        cross = self.mixed * m[..., None, :]
        found = self.cross - cross - np.swapaxes(cross, -1, -2) + m[..., :, None] * m[..., None, :] * self.squares
        share = float(self.squares[3, 3] / u[3] ** 2)
        scale = np.array([1.0] * 3 + [shared**0.5] * 3)
        return found / np.outer(u, u) * np.outer(scale, scale) / max(1 - share, 1e-12)

    @property
    def effective(self) -> float:
        """Effective number of steps behind the lagged products."""
        return float(self.weights[3] ** 2 / self.squares[3, 3]) if self.squares[3, 3] else 0.0

    def to_state(self) -> dict[str, Any]:
        """JSON-ready; floats survive exactly."""
        return _plain(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ProductAverages:
        """Read what `to_state` wrote."""
        return cls(**_arrays(state))


def _plain(averages: Any) -> dict[str, Any]:
    values = {f.name: getattr(averages, f.name) for f in fields(averages)}
    return {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in values.items()}


def _arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.array(x) if isinstance(x, list) else x for name, x in state.items()}


SHARED, SHARED_AT_MOST = 2.0, 3.0
"""Variance of a lagged average over that of its spread: 1 where noise rules, 4 over 4/3, or 3, where signal rules. The
middle is for decisions, the most for intervals."""


@dataclass(frozen=True)
class BiasAverage:
    """Average of c . h and c . e over looks at fresh prompts, c = E g_t - mu the bias of the trace gradient.

    A look takes (t_i - m_i) . hbar of the prompts of a step whose traces are in the bank; hbar is of earlier steps, so
    the mean is unbiased, and alpha was fixed before the step was drawn: nothing is held out.

    Attributes:
        sums: ``[2]``: c . h and c . e.
        cross: ``[2, 2]``: weighted sums of squares and products within looks, for the covariance.
        prompts: Prompts looked at.
    """

    sums: Array
    cross: Array
    prompts: int = 0

    @classmethod
    def empty(cls) -> BiasAverage:
        """Nothing seen yet."""
        return cls(np.zeros(2), np.zeros((2, 2)))

    def add(self, count: int, sums: Array, squares: Array) -> BiasAverage:
        """A look.

        Args:
            count: Its prompts.
            sums: ``[2]``, sums over them.
            squares: ``[2, 2]``, sums of squares and products.
        """
        mean = sums / count
        scatter = (squares - count * np.outer(mean, mean)) * count / max(count - 1, 1)
        if count == 1:  # no spread to judge by: the square itself
            scatter = np.asarray(squares)
        return BiasAverage(self.sums + sums, self.cross + scatter, self.prompts + count)

    @property
    def known(self) -> bool:
        """Whether there was a look."""
        return self.prompts > 0

    @property
    def mean(self) -> Array:
        """``[2]``: c . h and c . e; 0, the best guess near theta_ref, where there was no look."""
        return self.sums / self.prompts if self.prompts else np.zeros(2)

    @property
    def covariance(self) -> Array:
        """Of `mean`."""
        return self.cross / self.prompts**2 if self.prompts else np.zeros((2, 2))

    def to_state(self) -> dict[str, Any]:
        """JSON-ready."""
        return _plain(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> BiasAverage:
        """Read what `to_state` wrote."""
        return cls(**_arrays(state))
