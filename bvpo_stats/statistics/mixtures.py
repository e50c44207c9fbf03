r"""Mixtures of several estimators of mu, and what a budget of tokens buys: Theorem 2 beyond two gradients.

An estimator g_i has the bias ``b_i = E g_i - mu``. The error of a step with the weights w, which sum to one, is

    w' G w,     G_ij = b_i . b_j + tau tr Cov(g_i, g_j),     tau = eta L / B,

least over the simplex at the mixture; with two estimators its first weight is alpha*. The mean of k traces with the
answers held fixed has the bias of one trace and loses only trace-sampling variance s (Theorem 1's): nested means have

    tr Cov(t_j, t_k) = tr Sigma_t - s + s / max(j, k),        tr Cov(t_k, e) = tr Sigma_te.

**Same compute.** A step of B examples that takes k traces per answer and D_e costs ``B (k c_t + c_e)`` tokens, c_t and
c_e those of a pair; without D_e ``B k c_t``. A choice that costs less per example gets a larger batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError, check_positive
from bvpo_stats.statistics.alpha import AlphaInterval, Answer, alpha_interval, direction_ratio, minimiser
from bvpo_stats.statistics.estimates import Estimates, LinearRatio, estimates, noise_scale, prompt_norms
from bvpo_stats.statistics.intervals import (
    BOUNDED,
    SimpleInterval,
    jackknife_corrected,
    jackknife_normal,
    ratio_sets,
)
from bvpo_stats.statistics.moments import Array, MomentSummary, example_rows, summary_of_arrays

TRACE_COUNTS = (1, 2, 4)
"""Traces per answer whose means are looked at."""

MOST_ESTIMATORS = 8
"""All faces of the simplex are tried: 2^k of them."""


Rows = tuple[Array, Array | None]
"""An error, ``[1 + G]``, and its interactions."""


@dataclass(frozen=True)
class ErrorMatrix:
    """G of some estimators, with what intervals need.

    Attributes:
        names: The k estimators.
        rows: ``[1 + G, k, k]``, whole sample first.
        interactions: ``[I, k, k]``; None where the summary has none.
        summary: The moments behind it.
        alone: ``rows`` with single prompts left out, where groups hold several; None where they are not known (means of
            several traces: second draws are kept by group).
    """

    names: tuple[str, ...]
    rows: Array
    interactions: Array | None
    summary: MomentSummary = field(repr=False)
    alone: Array | None = field(default=None, repr=False)

    @classmethod
    def of_members(cls, summary: MomentSummary, names: Sequence[str], tau: float) -> ErrorMatrix:
        """G of members of a summary, mu the mean of its ``m`` (or of ``t``, at the reference point)."""
        at, m = [summary.index(name) for name in names], summary.index("m")

        def matrix(U: Array, C: Array) -> Array:
            U, C = U.sum(axis=-3), C.sum(axis=-3)
            cross = U[..., at, m]
            bias = U[..., at, :][..., at] - cross[..., :, None] - cross[..., None, :] + U[..., m, m][..., None, None]
            return np.asarray(bias + tau * C[..., at, :][..., at])

        pairs = summary.interactions
        own = None if pairs is None else matrix(pairs, -pairs)  # M has no interactions, so C = -U
        prompts = summary.prompts
        alone = None if prompts is None else matrix(prompts.U, prompts.covariance)
        return cls(tuple(names), matrix(summary.U, summary.covariance), own, summary, alone)

    @classmethod
    def of_traces(cls, summary: MomentSummary, counts: Sequence[int], tau: float, *, empty: bool = True) -> ErrorMatrix:
        """G of the means of k traces for each k in ``counts`` and (``empty``) of the empty-trace gradient.

        Raises:
            UserError: A mean of several traces, and no second trace draws to know it by.
        """
        if max(counts) > 1 and summary.trace_sampling is None:
            raise UserError("means of several traces need a second trace draw (trace2) for some examples; give it.")
        names = (*(trace_name(k) for k in counts), *(("e",) if empty else ()))

        def matrix(parts: Estimates) -> Array:
            sampling = parts.var_trace_sampling
            out = np.empty((len(parts.var_trace), len(names), len(names)))
            for i, j in np.ndindex(len(counts), len(counts)):
                most = max(counts[i], counts[j])
                saved = 0.0 if sampling is None else (1 - 1 / most) * sampling
                out[:, i, j] = parts.bias_trace_sq + tau * (parts.var_trace - saved)
            if empty:
                out[:, -1, :-1] = out[:, :-1, -1] = (parts.bias_cross + tau * parts.var_cross)[:, None]
                out[:, -1, -1] = parts.bias_empty_sq + tau * parts.var_empty
            return out

        # LinearRatio hands the interactions to what is linear in the estimates; the numerator is all that is wanted.
        found = LinearRatio.of(summary, lambda parts: (matrix(parts), parts.marginal_sq))
        pairs = None if found.interactions is None else found.interactions[0]
        alone = None if found.alone is None or max(counts) > 1 else found.alone.numerator
        return cls(names, found.numerator, pairs, summary, alone)

    def error(self, weights: Float[np.ndarray, " estimators"]) -> Rows:
        """``w' G w``, ``[1 + G]``, and its interactions."""
        rows = np.einsum("...ij,i,j->...", self.rows, weights, weights)
        pairs = self.interactions
        return rows, None if pairs is None else np.einsum("...ij,i,j->...", pairs, weights, weights)

    def mixed(self, weight: float | Array) -> Rows:
        """`error` of two estimators at a weight of the first, or at one for each row (then without interactions)."""
        shares = np.stack(np.broadcast_arrays(weight, 1 - np.asarray(weight)), axis=-1)
        if shares.ndim == 1:
            return self.error(shares)
        return np.einsum("gij,gi,gj->g", self.rows, shares, shares), None

    def weight(self, i: int, others: Sequence[int]) -> LinearRatio:
        """Weight of estimator i in the best mix of it and some others, as a ratio: ``(G^-1 1)_i / (1' G^-1 1)``.

        By Cramer's rule numerator and denominator are polynomials in G, linear for two estimators.
        """
        chosen = [i, *others]
        columns = np.arange(len(chosen))

        def tops(matrix: Array) -> Array:
            some = matrix[..., chosen, :][..., chosen]
            return np.stack([np.linalg.det(np.where(columns == j, 1.0, some)) for j in columns], axis=-1)

        rows = tops(self.rows)
        pairs = None
        if len(chosen) == 2 and self.interactions is not None:
            both = tops(self.interactions)
            pairs = (both[..., 0], both.sum(axis=-1))
        alone = None
        if self.alone is not None and self.summary.prompts is not None:
            each = tops(self.alone)
            alone = LinearRatio(each[..., 0], each.sum(axis=-1), self.summary.prompts.group_sizes)
        known = alone is not None or self.summary.prompts is None
        norms = prompt_norms(self.summary, ("t", "e") if "t" in self.summary.members else self.names) if known else None
        return LinearRatio(rows[..., 0], rows.sum(axis=-1), self.summary.group_sizes, pairs, alone, norms)


def trace_name(k: int) -> str:
    """``t`` for one trace, ``t2`` for the mean of two."""
    return "t" if k == 1 else f"t{k}"


def simplex_minimiser(matrix: Float[np.ndarray, "estimators estimators"]) -> Float[np.ndarray, " estimators"]:
    """Weights on the simplex with the least ``w' G w``, G symmetric; of equally good ones those with fewest estimators.

    A least point is stationary on the face that it lies in, so each face's stationary point is tried, corners first.
    That holds for an indefinite estimate of G, too.

    >>> simplex_minimiser(np.diag([1.0, 3.0]))
    array([0.75, 0.25])
    """
    G = np.asarray(matrix, dtype=np.float64)
    k = len(G)
    best, least = np.full(k, np.nan), np.inf
    slack = 1e-12 * np.abs(G).max(initial=0.0)
    for size in range(1, k + 1):
        for face in combinations(range(k), size):
            some = G[np.ix_(face, face)]
            bordered = np.block([[some, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            try:
                inside = np.linalg.solve(bordered, np.eye(size + 1)[-1])[:-1]
            except np.linalg.LinAlgError:
                continue  # a flat direction: its ends are on smaller faces
            if (inside < 0).any():
                continue
            value = float(inside @ some @ inside)
            if value < least - slack:
                best, least = np.zeros(k), value
                best[list(face)] = inside
    return best


@dataclass(frozen=True)
class Mixture:
    """The mixture of several estimators with the least error of a step.

    Attributes:
        weights: Estimator to its weight with interval; of one that is left out, that of the best mix with it.
        error: ``w' G w`` with its interval. The weights are fitted to the same data, so it is slightly too good.
        alone: Estimator to its own error.
        batch_size: B.
        eta_l: Learning rate times smoothness.
    """

    weights: dict[str, AlphaInterval]
    error: SimpleInterval
    alone: dict[str, SimpleInterval]
    batch_size: float
    eta_l: float

    def __str__(self) -> str:
        parts = [f"{interval.value:.3f} {name}" for name, interval in self.weights.items() if interval.value > 0]
        return f"{' + '.join(parts)} at batch size {self.batch_size:g}, eta L = {self.eta_l:g}"


def best_mixture(matrix: ErrorMatrix, *, batch_size: float, eta_l: float, level: float = 0.95) -> Mixture:
    """The least point over the simplex, and intervals of its weights by the set of every other weight here.

    Args:
        matrix: G at the tau of ``batch_size`` and ``eta_l``.
        batch_size: B.
        eta_l: Learning rate times smoothness.
        level: Confidence level.
    """
    summary, sizes = matrix.summary, matrix.summary.group_sizes
    best = simplex_minimiser(matrix.rows[0])
    support = [i for i, weight in enumerate(best) if weight > 0]
    weights = {}
    for i, name in enumerate(matrix.names):
        others = [j for j in support if j != i]
        faces = [others] if others else [[j] for j in range(len(best)) if j != i]  # alone: against each of the others
        sets = [alpha_interval(matrix.weight(i, face), summary, level) for face in faces]
        widest = min(sets, key=lambda found: found.low) if sets else None
        if widest is None:
            raise UserError("a mixture needs two estimators or more.")
        weights[name] = replace(widest, value=float(best[i]))
    rows = {name: matrix.error(np.eye(len(best))[i])[0] for i, name in enumerate(matrix.names)}
    alone = {name: jackknife_normal(row, sizes, level, floor=0.0) for name, row in rows.items()}
    error = jackknife_normal(matrix.error(best)[0], sizes, level, floor=0.0)
    return Mixture(weights, error, alone, batch_size, eta_l)


def mixture_from_gradients(
    estimators: Mapping[str, Float[np.ndarray, "examples parameters"]],
    m: Float[np.ndarray, "examples parameters"],
    *,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Mixture:
    """Best weights of any estimators of the marginal gradient, summing to one, none negative, with intervals.

    Args:
        estimators: Name to per-example gradients ``[N, d]``, two to eight: ``t``, ``e``, the mean of two traces, ...
        m: Unbiased estimates of the marginal gradients of the same examples; at the reference point the trace gradient.
        batch_size: Examples per optimizer step.
        eta_l: Learning rate times smoothness.
        level: Confidence level.
        clusters: Prompt of each example, where prompts have several pairs; None if all differ.

    Raises:
        UserError: Fewer than two estimators or more than eight, one called ``m``, shapes that disagree, or fewer than
            three prompts.

    Example:
        Three unbiased estimators of independent noise weigh as one over their variances.

        >>> rng = np.random.default_rng(0)
        >>> m = np.tile([1.0, 0.0], (4000, 1))
        >>> noisy = {f"sd {s}": m + s * rng.normal(size=m.shape) for s in (1, 2, 4)}
        >>> print(mixture_from_gradients(noisy, m))
        0.7... sd 1 + 0.1... sd 2 + 0.0... sd 4 at batch size 1, eta L = 1
    """
    if not 2 <= len(estimators) <= MOST_ESTIMATORS:
        raise UserError(f"`estimators` holds {len(estimators)}; give two to {MOST_ESTIMATORS}.")
    if "m" in estimators:
        raise UserError("`estimators` has one called m, the name of the marginal gradient; call it something else.")
    vectors = {name: example_rows(name, value) for name, value in {**estimators, "m": m}.items()}
    summary = summary_of_arrays(vectors, clusters=clusters)
    matrix = ErrorMatrix.of_members(summary, tuple(estimators), noise_scale(batch_size, eta_l))
    return best_mixture(matrix, batch_size=batch_size, eta_l=eta_l, level=level)


def trace_mixture(
    summary: MomentSummary,
    *,
    counts: Sequence[int] = TRACE_COUNTS,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
) -> Mixture:
    """Best mix of the means of k traces and the empty-trace gradient, all at the same batch size.

    Args:
        summary: Moments of t, e and m with second trace draws.
        counts: The k.
        batch_size: Examples per optimizer step.
        eta_l: Learning rate times smoothness.
        level: Confidence level.

    Raises:
        UserError: No second trace draws.
    """
    matrix = ErrorMatrix.of_traces(summary, counts, noise_scale(batch_size, eta_l))
    return best_mixture(matrix, batch_size=batch_size, eta_l=eta_l, level=level)


Choice = Literal["mix", "no_mix", "two_traces", "two_traces_mix", "batch", "step"]

CHOICES: dict[Choice, str] = {
    "mix": "the mix at alpha*",
    "no_mix": "no mix: traces alone",
    "two_traces_mix": "two traces per answer in the mix",
    "two_traces": "two traces per answer, no mix",
    "batch": "twice the batch, half as many steps",
    "step": "half the learning rate",
}
"""What could be done instead, in words."""


@dataclass(frozen=True)
class Advice:
    """One thing that could be done with the tokens of a step instead, and what it does to the error of a step.

    Attributes:
        choice: A name in `CHOICES`.
        alpha: Weight of the trace gradient.
        traces: Traces per answer.
        batch_size: Examples per step that cost as much as the reference's step (``batch``: twice its).
        eta_l: Learning rate times smoothness.
        progress: Learning rate times steps for the same tokens, relative to the reference: 1, or 1/2 where the choice
            buys its smaller error with a shorter way.
        error: Error of a step.
        change: ``error`` over the reference's, less 1; with its interval.
        low: Lower end; None where the set has none.
        high: Upper end, likewise.
        helps: Whether the error is less, at the confidence level.
    """

    choice: Choice
    alpha: float
    traces: int
    batch_size: float
    eta_l: float
    progress: float
    error: float
    change: float
    low: float | None
    high: float | None
    helps: Answer


def budget_advice(
    summary: MomentSummary,
    *,
    trace_tokens: float,
    empty_tokens: float,
    alpha: float = 0.5,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
) -> list[Advice]:
    """What would help most, for the tokens of a step that mixes with a fixed alpha: each choice's error beside its.

    Choices that cost less per example get more examples, those that cost more fewer, so that a step costs the same;
    twice the batch and half the step both halve tau, and both go half as far for the same tokens.
    Choices with two traces are left out where the summary has no second draws.

    Where alpha is the best one (``mix``, ``two_traces_mix``), it was fitted to the data that judge it. The jackknife
    takes that optimism out of the error. The interval is made of fixed weights: its lower end is the lowest over the
    confidence set of alpha*, its upper end that of the weight in the set that is nearest to the reference's. So a mix
    helps exactly where the set of alpha* does not hold the reference's weight.

    Args:
        summary: Moments of t, e and m.
        trace_tokens: c_t, tokens of a D_t pair.
        empty_tokens: c_e, tokens of a D_e pair.
        alpha: The reference's weight, the paper's 0.5.
        batch_size: Its examples per step.
        eta_l: Its learning rate times smoothness.
        level: Confidence level.

    Returns:
        In the order of `CHOICES`.

    Raises:
        UserError: Costs, alpha, batch or step size out of range.
    """
    check_positive("trace_tokens", trace_tokens)
    check_positive("empty_tokens", empty_tokens)
    if not 0 <= alpha <= 1:
        raise UserError(f"`alpha={alpha}`: a weight lies in [0, 1].")
    both = trace_tokens + empty_tokens
    with_e, without_e = (trace_tokens, 2 * trace_tokens), (both, both + trace_tokens)
    plans: dict[Choice, tuple[int, float | None, float, float]] = {  # traces, alpha (None: the best), batch, eta L
        "mix": (1, None, 1.0, 1.0),
        "no_mix": (1, 1.0, both / with_e[0], 1.0),
        "two_traces_mix": (2, None, both / without_e[1], 1.0),
        "two_traces": (2, 1.0, both / with_e[1], 1.0),
        "batch": (1, alpha, 2.0, 1.0),
        "step": (1, alpha, 1.0, 0.5),
    }
    base = ErrorMatrix.of_traces(summary, (1,), noise_scale(batch_size, eta_l)).mixed(alpha)
    found = []
    for choice, (traces, wanted, more, slower) in plans.items():
        if traces > 1 and summary.trace_sampling is None:
            continue
        size, rate = batch_size * more, eta_l * slower
        matrix = ErrorMatrix.of_traces(summary, (traces,), noise_scale(size, rate))
        if wanted is None:
            weight, error, low, high = _least(matrix.weight(0, [1]), matrix.mixed, alpha, base, summary, level)
        else:
            rows = matrix.mixed(wanted)
            weight, error, (low, high) = wanted, float(rows[0][0]), _compared(rows, base, summary, level)
        with np.errstate(invalid="ignore", divide="ignore"):
            change = float(np.divide(error, base[0][0])) - 1
        found.append(
            Advice(
                choice,
                weight,
                traces,
                size,
                rate,
                0.5 if choice in ("batch", "step") else 1.0,
                error,
                change,
                low - 1 if np.isfinite(low) else None,
                high - 1 if np.isfinite(high) else None,
                "yes" if high < 1 else "no" if low > 1 else "undecided",
            )
        )
    return found


def _compared(error: Rows, base: Rows, summary: MomentSummary, level: float) -> tuple[float, float]:
    """Ends of the set of an error over the reference's, infinite where it has none."""
    pairs = None if error[1] is None or base[1] is None else (error[1], base[1])
    sets = ratio_sets(LinearRatio.of_rows(error[0], base[0], summary, pairs), level)
    return (float(sets.low), float(sets.high)) if sets.shape == BOUNDED else (-np.inf, np.inf)


def _least(
    ratio: LinearRatio,
    error: Callable[[float | Array], Rows],
    alpha: float,
    base: Rows,
    summary: MomentSummary,
    level: float,
) -> tuple[float, float, float, float]:
    """The best weight, its error, and the ends of that over the error of a fixed weight; see `budget_advice`.

    The error is freed of its optimism by the jackknife: every row has the weight that it finds best.

    Args:
        ratio: The best weight, as a ratio.
        error: Of a weight, or of one for each row.
        alpha: The fixed weight.
        base: Its error.
        summary: The moments behind all of it.
        level: Confidence level.
    """
    best = alpha_interval(ratio, summary, level)
    weight = float(np.nan_to_num(best.value, nan=0.5))
    rows = error(np.nan_to_num(minimiser(ratio.numerator, ratio.denominator), nan=0.5))[0]
    low = min(_compared(error(end), base, summary, level)[0] for end in (best.low, weight, best.high))
    nearest = min(max(alpha, best.low), best.high)
    high = _compared(error(nearest), base, summary, level)[1]
    return weight, float(jackknife_corrected(rows, summary.group_sizes)[0]), low, high


@dataclass(frozen=True)
class Saving:
    """Share of the error of a fixed weight that the best one saves: its excess error over its error.

    Attributes:
        value: 0 where the fixed weight is the best, 1 where the best has no error; its estimate may lie outside.
        low: Lower end of its interval, clipped to [0, 1].
        high: Upper end, likewise.
    """

    value: float
    low: float
    high: float

    @property
    def identified(self) -> bool:
        """Whether the interval is less than all of [0, 1]."""
        return self.low > 0 or self.high < 1


def excess_error(
    summary: MomentSummary,
    alpha: float = 0.5,
    *,
    batch_size: float = 1.0,
    eta_l: float | None = 1.0,
    level: float = 0.95,
) -> Saving:
    """``(E(alpha) - E(alpha*)) / E(alpha)``, what a fixed weight costs; intervals as in `budget_advice`.

    With an ``eta_l`` E is the error of a step. With None it is the error of the best multiple of the mix, for
    optimizers that ignore length, and alpha* that of `direction_alpha`:

        E(w) = norm(mu)^2 - (v . w)^2 / (w' M w).

    Args:
        summary: Moments of t, e and m.
        alpha: The fixed weight.
        batch_size: Examples per step.
        eta_l: Learning rate times smoothness; None for direction only.
        level: Confidence level.
    """
    mixed: Callable[[float | Array], Rows]
    if eta_l is None:
        parts = estimates(summary)
        ratio, tau = direction_ratio(summary, batch_size), noise_scale(batch_size)

        def mixed(w: float | Array) -> Rows:
            rest = 1 - np.asarray(w)
            along = w * parts.trace_dot_marginal + rest * parts.empty_dot_marginal
            mean = w**2 * parts.trace_sq + 2 * w * rest * parts.trace_dot_empty + rest**2 * parts.empty_sq
            return np.asarray(parts.marginal_sq - along**2 / (mean + tau * parts.variance(w))), None

    else:
        matrix = ErrorMatrix.of_traces(summary, (1,), noise_scale(batch_size, eta_l))
        ratio, mixed = matrix.weight(0, [1]), matrix.mixed

    base = mixed(alpha)
    _, error, low, high = _least(ratio, mixed, alpha, base, summary, level)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = 1 - float(np.divide(error, base[0][0]))
    return Saving(value, float(np.clip(1 - high, 0.0, 1.0)), float(np.clip(1 - low, 0.0, 1.0)))
