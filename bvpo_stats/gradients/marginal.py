"""The marginal gradient m of one prompt, as weights on the scores of its traces, and what they are worth.

    m = chosen_weight(M) S(y+) + rejected_weight(M) S(y-)
    log pi(y | x) = log E_{r ~ q} w,   S(y) = grad log pi(y | x) = E_{r ~ pi(r | x, y)} s(r, y)      (Fisher's identity)

with ``w = pi_theta(r, y | x) / q(r)`` and M the margin of the log-marginals (DPO: weights -+ beta sigmoid(-M)). Every
estimator here replaces S by a weighted mean of the scores of K traces, and M by

    log pi_theta(y | x) / pi_ref(y | x) = log sum_k w_k - log sum_k v_k,      v = pi_ref(r, y | x) / q(r),

so all of it is arithmetic on log-probabilities: the traces' scores are combined inside one backward and never stored.
With posterior traces of pi_ref (q proportional to pi_ref(r, y | x)) all v are equal and this is the ratio identity,
log mean exp(Delta). Normalisers of q cancel. Functions of log-weights ``[K]`` and scores ``[K, d]`` know no model.

Which estimator is unbiased:

* `snis`: bias ``-E_q[w^2 (s - S)] / (K (E_q w)^2)`` to leading order (Cardoso et al. 2022; Agapiou et al. 2017).
* `anchored_snis`: the same arithmetic where the first trace is an exact posterior draw and the rest come from q: no
  bias for any K (the invariance of the i-SIR kernel, Andrieu, Lee and Vihola 2018).
* `log_mean_weight`: ``log`` of an unbiased mean, bias ``-Var(w / E w) / (2 K)``. With ``w = exp(Delta)`` and traces of
  pi_ref's posterior it estimates ``log pi(y | x) / pi_ref(y | x)``.
* `multilevel`: antithetic multilevel Monte Carlo, no bias (Blanchet and Glynn 2015; Shi and Cornish 2021).
* `jackknife`: bias of order ``1 / K^2`` (JVI, Nowozin 2018); its implied weights can be negative.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import SideBank
from bvpo_stats.gradients.objectives import Objective, PairLogps
from bvpo_stats.gradients.options import MarginalMethod
from bvpo_stats.records import TraceRecord
from bvpo_stats.statistics.moments import Array

Functional = Callable[[Int[np.ndarray, " chosen"]], Array]
"""A statistic of a subset of the traces, given by their indices; `multilevel` and `jackknife` remove its bias."""


def normalised_weights(log_weights: Float[np.ndarray, "*batch traces"]) -> Float[np.ndarray, "*batch traces"]:
    """Weights that sum to one along the last axis, computed without overflow.

    Raises:
        UserError: All weights are zero, or a log-weight is NaN or +inf.
    """
    log_weights = np.asarray(log_weights, dtype=np.float64)
    if np.isnan(log_weights).any() or np.isposinf(log_weights).any():
        raise UserError("a log-weight is NaN or infinite; check the log-probabilities of the traces.")
    total = logsumexp(log_weights, axis=-1, keepdims=True)
    if np.isneginf(total).any():
        raise UserError("all traces of an answer have weight zero, so its marginal cannot be estimated from them.")
    return np.exp(log_weights - total)


def log_mean_weight(log_weights: Float[np.ndarray, "*batch traces"]) -> Float[np.ndarray, "*batch"]:
    """``log((1 / K) sum_k w_k)``: log pi(y | x) from draws of q, its log-ratio to pi_ref from pi_ref's posterior."""
    log_weights = np.asarray(log_weights, dtype=np.float64)
    return np.asarray(logsumexp(log_weights, axis=-1) - np.log(log_weights.shape[-1]))


def snis(
    log_weights: Float[np.ndarray, "*batch traces"], scores: Float[np.ndarray, "*batch traces parameters"]
) -> Float[np.ndarray, "*batch parameters"]:
    """Self-normalised importance sampling, ``sum_k w_k s_k / sum_k w_k``, from K draws of q.

    Its bias does not shrink with the number of prompts: it shifts alpha by ``E(g_t - g_e) . bias / A``.

    >>> snis(np.log([1.0, 3.0]), np.array([[0.0], [4.0]]))
    array([3.])
    """
    return np.einsum("...k,...kd->...d", normalised_weights(log_weights), np.asarray(scores, dtype=np.float64))


def anchored_snis(
    log_weights: Float[np.ndarray, "*batch traces"], scores: Float[np.ndarray, "*batch traces parameters"]
) -> Float[np.ndarray, "*batch parameters"]:
    """`snis` with the anchor first: trace 0 from the exact posterior pi(r | x, y), traces 1 .. K-1 from q.

    Exactly unbiased for S(y) at any K: with ``r_0 ~ w q / Z`` the joint density of the K traces is ``w_0 / Z`` times
    that of K draws of q, and averaging over which of them is called the anchor turns the ratio into a plain mean. At
    temperature 1 every generated (r, y) supplies its own anchor; K = 1 is that single trace.

    The value is symmetric in the traces; this name exists to say which of them the caller must supply.
    """
    return snis(log_weights, scores)


def antithetic_difference(functional: Functional, indices: Int[np.ndarray, " traces"]) -> Array:
    """``f(all) - (f(first half) + f(second half)) / 2``, the correction of one level."""
    half = len(indices) // 2
    if half * 2 != len(indices):
        raise UserError(f"the antithetic difference needs an even number of traces, got {len(indices)}.")
    return functional(indices) - (functional(indices[:half]) + functional(indices[half:])) / 2


def level_probabilities(levels: int) -> Float[np.ndarray, " levels"]:
    """``p_l ~ 2^(-3 l / 2)`` for l = 1 .. levels, between the cost (2^l) and the variance (2^(-2 l)) of a level.

    >>> level_probabilities(2).round(3)
    array([0.739, 0.261])
    """
    weights = 2.0 ** (-1.5 * np.arange(1, levels + 1))
    return weights / weights.sum()


def multilevel(functional: Functional, traces: int, level: int, *, base: int = 1, levels: int | None = None) -> Array:
    """Single-term antithetic multilevel estimate, ``mean f(blocks of base traces) + Delta_level / p_level``.

    Draw ``level`` from `level_probabilities` and provide ``base * 2^level`` independent, identically drawn traces (no
    anchor among them: the halves must look alike). The expectation telescopes to that of f on ``base * 2^levels``
    traces, ``E f_0 + sum_l E Delta_l``: with the number of levels capped, what bias remains is that of f at the cap.

    Args:
        functional: Statistic of a subset of the traces, such as `snis` of them, or the whole of
            ``-beta sigmoid(-M) (S(y+) - S(y-))``, whose second nonlinearity is corrected as well.
        traces: Traces at hand, ``base * 2^level``.
        level: The level drawn, 1 .. levels.
        base: Traces at level 0.
        levels: Number of levels that ``level`` was drawn from.

    Raises:
        UserError: The number of traces does not fit the level.
    """
    top = level if levels is None else levels
    if not 1 <= level <= top or traces != base * 2**level:
        raise UserError(f"level {level} of {top} needs {base * 2**level} traces, got {traces}; draw that many.")
    indices = np.arange(traces)
    ground = np.mean([functional(block) for block in indices.reshape(-1, base)], axis=0)
    return ground + antithetic_difference(functional, indices) / level_probabilities(top)[level - 1]


def jackknife(functional: Functional, traces: int) -> Array:
    """``K f(all) - (K - 1) mean_k f(all but k)``: removes the bias of order 1/K (JVI for ``log_mean_weight``)."""
    if traces < 2:
        raise UserError("the jackknife over traces needs at least two of them; raise the number of traces per answer.")
    indices = np.arange(traces)
    without = np.mean([functional(np.delete(indices, k)) for k in indices], axis=0)
    return traces * functional(indices) - (traces - 1) * without


@dataclass(frozen=True)
class SnisBias:
    """Exact quantities of a finite trace space and the leading-order biases they predict at K traces.

    Attributes:
        score: ``-E_q[w^2 (s - S)] / (K (E_q w)^2)``, bias of `snis`, ``[d]``.
        log_marginal: ``-Var_q(w / E_q w) / (2 K)``, bias of `log_mean_weight`.
    """

    score: Array
    log_marginal: float


def predicted_snis_bias(
    proposal: Float[np.ndarray, " space"],
    log_weights: Float[np.ndarray, " space"],
    scores: Float[np.ndarray, "space parameters"],
    traces: int,
) -> SnisBias:
    """Leading-order bias of `snis` and `log_mean_weight` with K traces, from the whole trace space.

    Args:
        proposal: q of every trace.
        log_weights: log w of every trace.
        scores: Score of every trace.
        traces: K.
    """
    q = np.asarray(proposal, dtype=np.float64)
    w = np.exp(np.asarray(log_weights) - logsumexp(log_weights, b=q))
    centred = np.asarray(scores) - (q * w) @ scores
    return SnisBias(-(q * w**2) @ centred / traces, float(-(q @ (w - 1) ** 2) / (2 * traces)))


@dataclass(frozen=True)
class WeightDiagnostics:
    """Diagnostics of the K weights of one answer.

    Attributes:
        traces: K.
        effective_size: ``1 / sum_j wbar_j^2`` over the distinct traces, each with the weights of all its copies: the
            same trace eight times is one. Between 1 and K.
        largest: Largest normalised weight of a trace.
        anchor_gap: ``J = E_posterior[log w] - E_q[log w]``, the Jeffreys divergence between posterior and proposal; it
            needs no normaliser. None without draws of both kinds.
        log_traces: ``log K``; ``J <= log K`` certifies, ``J >> log K`` is a red flag.
        k_hat: Pareto tail index of the weights; None where K is too small for a fit or arviz-stats is missing.
        k_threshold: ``min(1 - 1 / log10 K, 0.7)``: below it the estimate is as good as its effective size says
            (Vehtari et al. 2024). Under K = 25 a certificate is out of reach.
        certified: Whether the weights pass: ``J <= log K`` (where J is known) and ``k_hat < k_threshold`` (where
            known), with at least one of the two known.
        distinct: Distinct traces among the K.
        draws_size: ``1 / sum_k wbar_k^2`` over the K draws, copies apart: what shows weights that have collapsed. A
            posterior with one likely trace gives K copies of it, and a good estimate.
    """

    traces: int
    effective_size: float
    largest: float
    anchor_gap: float | None
    log_traces: float
    k_hat: float | None
    k_threshold: float
    certified: bool
    distinct: int = 0
    draws_size: float = math.nan


def effective_sample_size(log_weights: Float[np.ndarray, "*batch traces"]) -> Float[np.ndarray, "*batch"]:
    """``1 / sum_k wbar_k^2``.

    >>> round(float(effective_sample_size(np.zeros(8))), 9)
    8.0
    """
    return np.asarray(1 / (normalised_weights(log_weights) ** 2).sum(axis=-1))


def anchor_gap(posterior: Float[np.ndarray, " anchors"], proposal: Float[np.ndarray, " draws"]) -> float:
    """``J = E_posterior[log w] - E_q[log w] = KL(posterior | q) + KL(q | posterior)``.

    Args:
        posterior: Log-weights of exact posterior draws (anchors).
        proposal: Log-weights of draws of q. One of weight zero makes the gap infinite, as it should.
    """
    return float(np.mean(posterior) - np.mean(proposal))


def k_hat_threshold(traces: int) -> float:
    """``min(1 - 1 / log10 K, 0.7)``, from Vehtari et al. (2024), and minus infinity where K <= 1.

    >>> [round(k_hat_threshold(K), 2) for K in (10, 25, 100, 10000)]
    [0.0, 0.28, 0.5, 0.7]
    """
    return min(1 - 1 / math.log10(traces), 0.7) if traces > 1 else -math.inf


def pareto_k_hat(log_weights: Float[np.ndarray, " traces"]) -> float | None:
    """Shape k of a generalised Pareto fit to the largest weights; k > 0: moments of order 1/k and above are infinite.

    The fit is that of arviz-stats (Zhang and Stephens 2009, with the weak prior of Vehtari et al.). Its ``psislw``
    expects log-*likelihoods* and negates them, so log-weights go in with a minus sign; passed as they are, the fit
    would describe the smallest weights instead.

    Returns:
        k-hat; None if the tail would hold fewer than 5 weights (K < 25), if all its weights are equal, or if
        arviz-stats is not installed.
    """
    values = np.asarray(log_weights, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 25 or np.ptp(values) == 0:
        return None
    try:
        from arviz_stats.base import array_stats  # type: ignore[attr-defined]
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _, k_hat = array_stats.psislw(-values)
        except ValueError:  # all tail values equal
            return None
    return float(k_hat)


def diagnose(
    log_weights: Float[np.ndarray, " traces"],
    anchors: Float[np.ndarray, " anchors"] | None = None,
    names: Int[np.ndarray, " traces"] | None = None,
) -> WeightDiagnostics:
    """All diagnostics of the weights of one answer.

    Args:
        log_weights: Log-weights of the K draws of q.
        anchors: Log-weights of exact posterior draws, where there are any.
        names: Which trace each draw is: equal numbers for equal traces; None for all different.
    """
    draws = normalised_weights(log_weights)
    traces = len(draws)
    which = np.arange(traces) if names is None else np.unique(names, return_inverse=True)[1]
    weights = np.bincount(which, weights=draws)
    gap = None if anchors is None or len(anchors) == 0 else anchor_gap(anchors, log_weights)
    k_hat, threshold = pareto_k_hat(log_weights), k_hat_threshold(traces)
    tests = [] if gap is None else [gap <= math.log(traces)]
    tests += [] if k_hat is None else [k_hat < threshold]
    return WeightDiagnostics(
        traces=traces,
        effective_size=float(1 / (weights**2).sum()),
        largest=float(weights.max()),
        anchor_gap=gap,
        log_traces=math.log(traces),
        k_hat=k_hat,
        k_threshold=threshold,
        certified=bool(tests) and all(tests),
        distinct=len(weights),
        draws_size=float(1 / (draws**2).sum()),
    )


def half_split_cosine(
    log_weights: Float[np.ndarray, " traces"], scores: Float[np.ndarray, "traces parameters"]
) -> float:
    """Cosine between the marginal scores from the even and from the odd traces; near 1 when the traces agree."""
    log_weights, scores = np.asarray(log_weights), np.asarray(scores)
    first, second = (snis(log_weights[k::2], scores[k::2]) for k in (0, 1))
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / scale if scale > 0 else math.nan


Coefficients = tuple[Float[np.ndarray, " chosen_traces"], Float[np.ndarray, " rejected_traces"]]
Rows = Int[np.ndarray, " _"]


@dataclass(frozen=True)
class SideTraces:
    """The traces of one answer y, in log-probabilities.

    Attributes:
        log_policy: log pi_theta(r, y | x).
        log_ref: log pi_ref(r, y | x).
        log_proposal: log q of each trace; up to a constant, except where ``normalised``.
        answer_tokens: Tokens of y.
        anchored: Whether trace 0 is a posterior draw while the others are draws of q.
        normalised: Whether q is the law of the traces with its normaliser, so that the mean of w estimates pi(y | x).
        names: Which trace each is: equal numbers for equal traces; None for all different.
    """

    log_policy: Float[np.ndarray, " traces"]
    log_ref: Float[np.ndarray, " traces"]
    log_proposal: Float[np.ndarray, " traces"]
    answer_tokens: int
    anchored: bool = False
    normalised: bool = False
    names: Int[np.ndarray, " traces"] | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.log_weights).all():
            raise UserError("A trace has no finite log-weight; check trace_logp and joint_logp of the trace bank.")

    def __len__(self) -> int:
        return len(self.log_policy)

    @property
    def log_weights(self) -> Float[np.ndarray, " traces"]:
        """Log w."""
        return self.log_policy - self.log_proposal

    @property
    def log_ref_weights(self) -> Float[np.ndarray, " traces"]:
        """Log v."""
        return self.log_ref - self.log_proposal


@dataclass(frozen=True)
class SideDiagnostics:
    """Can the traces of one answer be trusted?

    Attributes:
        prompt_id: The prompt.
        side: Which answer of its D_t pair.
        weights: Effective size, largest weight, anchor gap, k-hat.
    """

    prompt_id: str
    side: Literal["chosen", "rejected"]
    weights: WeightDiagnostics


@dataclass(frozen=True)
class MarginalEstimator:
    """From the log-probabilities of a prompt's traces to the weights of their scores in m.

    Attributes:
        objective: The loss.
        method: ``anchored``, ``posterior`` and ``prior`` weigh all traces (which of the three is a matter of what the
            traces are); off theta_ref the margin and the scores take disjoint halves, both ways round, because their
            product would be biased otherwise. ``jackknife`` and ``multilevel`` work on the whole of m, both of its
            nonlinearities included, with trace k of one answer tied to trace k of the other. A bank of K traces ends
            the levels of ``multilevel`` at log2 K; E Delta_l halves from level to level, so the missing ones together
            are worth the last once more, which is added. Both have a bias of order 1 / K^2 then, of the plug-in's
            1 / K: unbiased would need banks without a largest size.
        at_reference: theta = theta_ref: every log-ratio is 0, and the margin with it.
    """

    objective: Objective
    method: Literal["anchored", "posterior", "prior", "jackknife", "multilevel"]
    at_reference: bool = False

    def __call__(self, chosen: SideTraces, rejected: SideTraces, rng: np.random.Generator) -> Coefficients:
        """Weights of the scores: m = sum_k c_k s(r+_k, y+) + sum_k c'_k s(r-_k, y-).

        Args:
            chosen: Traces of y+.
            rejected: Traces of y-.
            rng: Draws the level of ``multilevel``.

        Raises:
            UserError: Too few traces for the method, or an objective that needs a normaliser which they do not give.
        """
        if self.method in ("jackknife", "multilevel"):
            return self._debiased(chosen, rejected, rng)
        if self.margin_is_constant or min(len(chosen), len(rejected)) < 2 + chosen.anchored:
            everything = np.arange(len(chosen)), np.arange(len(rejected))
            return self.plug_in((chosen, rejected), everything, everything)
        first, second = zip(*(_margin_halves(side) for side in (chosen, rejected)), strict=True)
        terms = [self.plug_in((chosen, rejected), _others(chosen, rejected, half), half) for half in (first, second)]
        return (terms[0][0] + terms[1][0]) / 2, (terms[0][1] + terms[1][1]) / 2

    @property
    def margin_is_constant(self) -> bool:
        """Whether M needs no traces: at theta_ref, for objectives that contrast the policy with a reference."""
        return self.at_reference and self.objective.needs_reference

    def halves(self, chosen: SideTraces, rejected: SideTraces) -> tuple[Coefficients, Coefficients]:
        """The two m from the traces of even and of odd number, for the half-split diagnostic.

        A side with a single trace lends it to both halves.
        """
        splits = []
        for start in (0, 1):
            rows = [np.arange(start, len(side), 2) if len(side) > 1 else np.arange(1) for side in (chosen, rejected)]
            splits.append(self.plug_in((chosen, rejected), (rows[0], rows[1]), (rows[0], rows[1])))
        return splits[0], splits[1]

    def plug_in(
        self, sides: tuple[SideTraces, SideTraces], scores: tuple[Rows, Rows], margin: tuple[Rows, Rows]
    ) -> Coefficients:
        """Self-normalised weights of some traces for S, times the objective's weight at the margin of some traces."""
        weights = self._score_weights(sides, margin)
        found = []
        for side, rows, weight in zip(sides, scores, weights, strict=True):
            coefficients = np.zeros(len(side))
            log_weights = side.log_weights[rows]
            coefficients[rows] = weight * np.exp(log_weights - _log_sum_exp(log_weights))
            found.append(coefficients)
        return found[0], found[1]

    def _debiased(self, chosen: SideTraces, rejected: SideTraces, rng: np.random.Generator) -> Coefficients:
        traces = min(len(chosen), len(rejected))
        if traces < 2:
            raise UserError(
                f"The {self.method} estimator needs two traces for each answer; make a bank with more "
                "(`traces_per_answer`)."
            )

        def functional(rows: Rows) -> Float[np.ndarray, " both_sides"]:
            return np.concatenate(self.plug_in((chosen, rejected), (rows, rows), (rows, rows)))

        if self.method == "jackknife":
            found = jackknife(functional, traces)
        else:
            levels = int(np.log2(traces))
            probabilities = level_probabilities(levels)
            level = 1 + int(rng.choice(levels, p=probabilities))
            found = multilevel(functional, 2**level, level, levels=levels)
            if level == levels:
                found = found + antithetic_difference(functional, np.arange(2**level)) / probabilities[-1]
        return found[: len(chosen)], found[len(chosen) :]

    def _score_weights(self, sides: tuple[SideTraces, SideTraces], rows: tuple[Rows, Rows]) -> tuple[float, float]:
        """The objective's weights on S(y+) and S(y-) at the estimated margin."""
        policy, reference = [], [0.0, 0.0]
        for side, used in zip(sides, rows, strict=True):
            if self.objective.needs_reference:
                ratio = _log_sum_exp(side.log_weights[used]) - _log_sum_exp(side.log_ref_weights[used])
                policy.append(0.0 if self.margin_is_constant else ratio)
            else:
                drawn = used[1:] if side.anchored and used[0] == 0 else used
                policy.append(self._log_marginal(side, drawn))
        tokens = [float(side.answer_tokens) for side in sides]
        terms = self.objective(PairLogps(*np.array([*policy, *tokens, *reference])[:, None]))
        return float(terms.chosen_weight[0]), float(terms.rejected_weight[0])

    def _log_marginal(self, side: SideTraces, rows: Rows) -> float:
        if not side.normalised or not len(rows):
            raise UserError(
                f"The objective {self.objective.name} needs log pi(y | x) itself, which only prior traces give; use "
                "`method='prior'` with a bank that has them."
            )
        return float(log_mean_weight(side.log_weights[rows]))


def diagnose_side(side: SideTraces, anchor: float | None = None) -> WeightDiagnostics:
    """Diagnostics of the weights of one answer.

    Effective size and largest weight are those of all weights in use; anchor gap and k-hat are about the draws of q.

    Args:
        side: Its traces.
        anchor: Log-weight of an exact posterior draw, where the traces have none among them.
    """
    if not side.anchored:
        return diagnose(side.log_weights, None if anchor is None else np.array([anchor]), side.names)
    used = diagnose(side.log_weights, names=side.names)
    if len(side) == 1:
        return used
    drawn = diagnose(side.log_weights[1:], side.log_weights[:1])
    kept = ("traces", "effective_size", "largest", "distinct", "draws_size")
    return replace(drawn, **{name: getattr(used, name) for name in kept})


def _log_sum_exp(values: Float[np.ndarray, " traces"]) -> float:
    """scipy's, without its overhead: it is called several times for every prompt."""
    largest = values.max()
    return float(largest + np.log(np.exp(values - largest).sum()))


def _margin_halves(side: SideTraces) -> tuple[Rows, Rows]:
    """Two disjoint sets of traces to estimate the margin from; an anchor is left to the scores."""
    rows = np.arange(int(side.anchored), len(side))
    return rows[0::2], rows[1::2]


def _others(chosen: SideTraces, rejected: SideTraces, margin: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
    """The traces that the margin does not use."""
    return (
        np.setdiff1d(np.arange(len(chosen)), margin[0]),
        np.setdiff1d(np.arange(len(rejected)), margin[1]),
    )


COLLAPSED_SIZE = 1.5
"""Effective size under which the traces of an answer count as one."""

COLLAPSED_SHARE = 0.5
"""Share of answers with collapsed weights beyond which mu is not estimable."""

ANCHOR_GAP_FACTOR = 2.0
"""An anchor gap beyond this multiple of log K is a red flag: about e^J draws would be needed to see the posterior."""


@dataclass(frozen=True)
class MarginalDiagnostics:
    """Trace weights over all pair sides.

    Attributes:
        sides: Pair sides.
        traces: Mean number of traces per side.
        effective_size: Mean effective size.
        median_effective_size: Median effective size.
        largest: Mean of the largest normalised weight.
        anchor_gap: Mean of the anchor gap J over the sides that have one (each rests on a single anchor; the mean is
            what to compare with log K); None without.
        log_traces: Log of the mean number of proposal draws.
        k_hat: Largest Pareto k-hat over the sides where it could be fitted; None without.
        k_threshold: Threshold for k-hat at the largest number of traces.
        certified: Share of sides whose own diagnostics certify them.
        collapsed_share: Share of sides with at least two traces whose weights, copies apart, are worth less than
            `COLLAPSED_SIZE` of them.
        collapsed: Whether mu is not estimable from these weights: most such sides are collapsed, or the anchor gap is
            far beyond log K (draws that all miss the posterior can have equal weights and a large effective size).
    """

    sides: int
    traces: float
    effective_size: float
    median_effective_size: float
    largest: float
    anchor_gap: float | None
    log_traces: float
    k_hat: float | None
    k_threshold: float
    certified: float
    collapsed_share: float
    collapsed: bool

    @property
    def failure(self) -> str | None:
        """Why mu is not estimable from these weights, in words; None where it is."""
        if not self.collapsed:
            return None
        if self.collapsed_share > COLLAPSED_SHARE or self.anchor_gap is None:
            return f"the weights of {self.collapsed_share:.0%} of the answers have collapsed"
        return f"the draws miss the posterior (anchor gap {self.anchor_gap:.2g} against log K = {self.log_traces:.2g})"


def aggregate(diagnostics: Sequence[SideDiagnostics]) -> MarginalDiagnostics:
    """Diagnostics of all pair sides in one.

    A side with one trace has nothing to collapse; if no side has more, the weights say nothing and ``collapsed`` is
    False.

    Raises:
        UserError: There are none.
    """
    if not diagnostics:
        raise UserError("There are no trace weights to diagnose; the method uses no trace bank.")
    weights = [side.weights for side in diagnostics]
    sizes = np.array([w.effective_size for w in weights])
    draws = np.array([w.draws_size for w in weights])
    several = np.array([w.traces > 1 for w in weights])
    gaps = [w.anchor_gap for w in weights if w.anchor_gap is not None]
    k_hats = [w.k_hat for w in weights if w.k_hat is not None]
    collapsed_share = float((draws[several] < COLLAPSED_SIZE).mean()) if several.any() else 0.0
    log_traces = float(np.log(np.mean(np.exp([w.log_traces for w in weights]))))
    gap = float(np.mean(gaps)) if gaps else None
    missed = gap is not None and gap > ANCHOR_GAP_FACTOR * max(log_traces, np.log(2))
    return MarginalDiagnostics(
        sides=len(weights),
        traces=float(np.mean([w.traces for w in weights])),
        effective_size=float(sizes.mean()),
        median_effective_size=float(np.median(sizes)),
        largest=float(np.mean([w.largest for w in weights])),
        anchor_gap=gap,
        log_traces=log_traces,
        k_hat=max(k_hats) if k_hats else None,
        k_threshold=max(w.k_threshold for w in weights),
        certified=float(np.mean([w.certified for w in weights])),
        collapsed_share=collapsed_share,
        collapsed=collapsed_share > COLLAPSED_SHARE or missed,
    )


def select_traces(bank: SideBank, method: MarginalMethod, most: int | None) -> tuple[TraceRecord, ...]:
    """The traces of a side that a method uses.

    ``posterior`` takes the pair's own trace, same-answer draws and chain states, in this order. Where the pair was
    sampled at a temperature T other than 1, the first two are draws of q_T(r | x, y) and the chain's are draws of
    pi_ref(r | x, y); normalisers differ, so the larger group is used alone. ``multilevel`` needs independent draws of
    one law: own and same-answer traces, or prior ones where there are more.

    Args:
        bank: The side's traces.
        method: The method.
        most: K; None for all.

    Raises:
        UserError: The bank lacks what the method needs.
    """
    # Of an unknown temperature the law of the pair's own trace is unknown too.
    independent = () if bank.own.temperature is None else (bank.own, *bank.same_answer)
    where = f"prompt {bank.own.prompt_id} ({bank.own.side})"
    if method == "prior" or method == "anchored":
        if not bank.prior:
            raise UserError(
                f"The trace bank has no prior traces for {where}, which `method={method!r}` needs; make the bank with "
                "`sources=('anchor', 'prior')`, or choose another method."
            )
        if method == "prior":
            return bank.prior[:most]
        if math.isnan(bank.own.trace_logp):
            raise UserError(f"The trace bank has no anchor for {where}; make it with `sources=('anchor', 'prior')`.")
        return (bank.own, *bank.prior)[:most]
    if method == "multilevel":
        return (independent if len(independent) >= len(bank.prior) else bank.prior)[:most]
    if method == "jackknife" and len(bank.prior) > len(independent) + len(bank.chain):
        return bank.prior[:most]
    if bank.own.temperature == 1.0:
        return (*independent, *bank.chain)[:most]
    return (bank.chain if len(bank.chain) > len(independent) else independent)[:most]
