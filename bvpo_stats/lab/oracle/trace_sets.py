"""Estimates of the marginal gradient from K sampled traces, thousands at a time, with their exact expectations.

For one example (x, y+, y-) an estimator draws K traces a side from a proposal and forms

    m_hat = -beta sigmoid(-M_hat) (S_hat(y+) - S_hat(y-)),

S_hat by self-normalised weights ``w = pi_theta(r, y | x) / q(r)``, and ``M_hat`` from ``log mean w - log mean w_ref``
of a second, disjoint set. Traces are exchangeable, so expectations are sums over how often each trace was drawn
(multinomial counts), which the small oracle can list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import expit, gammaln, logsumexp

from bvpo_stats.gradients.marginal import level_probabilities
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle.build import Oracle, shortened
from bvpo_stats.lab.oracle.draws import categorical, draw_posterior_traces, draw_prior_traces
from bvpo_stats.lab.oracle.exact import (
    ExactMoments,
    Scored,
    exact_moments,
    pair_weights,
    trace_responses,
    without_scores,
)
from bvpo_stats.statistics.estimates import Estimates


def multisets(
    law: Float[np.ndarray, " outcomes"], size: int
) -> tuple[Float[np.ndarray, "ways outcomes"], Float[np.ndarray, " ways"]]:
    """Every way to draw ``size`` times from a law: counts of each outcome, and multinomial probabilities.

    Args:
        law: Probabilities of the outcomes, all positive.
        size: Number of draws; there are C(size + outcomes - 1, outcomes - 1) ways.

    >>> counts, probability = multisets(np.array([0.25, 0.75]), 2)
    >>> counts.tolist(), probability.round(4).tolist()
    ([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]], [0.5625, 0.375, 0.0625])
    """
    n = len(law)
    bars = np.array(list(combinations(range(size + n - 1), n - 1))).reshape(-1, n - 1)
    edges = np.concatenate([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), size + n - 1)], axis=1)
    counts = np.diff(edges, axis=1) - 1.0
    log_probability = gammaln(size + 1) - gammaln(counts + 1).sum(axis=1) + counts @ np.log(law)
    return counts, np.exp(log_probability)


def expected_snis(
    proposal: Float[np.ndarray, " traces"],
    weights: Float[np.ndarray, " traces"],
    scores: Float[np.ndarray, "traces parameters"],
    n_traces: int,
    anchor: Float[np.ndarray, " traces"] | None = None,
) -> Float[np.ndarray, " parameters"]:
    """E[sum_k w_k s_k / sum_k w_k] over K traces.

    Args:
        proposal: q(r).
        weights: w(r), up to a factor.
        scores: s(r, y).
        n_traces: K.
        anchor: Law of the first trace where it is an anchor, the other K - 1 being of q; None for K draws of q.
    """
    if anchor is None:
        counts, probability = multisets(proposal, n_traces)
        return probability @ (counts * weights @ scores / (counts @ weights)[:, None])
    counts, probability = multisets(proposal, n_traces - 1)
    total = np.zeros(scores.shape[-1])
    for first, chance in enumerate(anchor):
        with_anchor = counts + np.eye(len(proposal))[first]
        mean = (with_anchor * weights) @ scores / (with_anchor @ weights)[:, None]
        total = total + chance * (probability @ mean)
    return total


Array: TypeAlias = NDArray[Any]
TraceMethod = Literal["anchored", "posterior", "prior", "multilevel"]
METHODS: tuple[TraceMethod, ...] = ("anchored", "posterior", "prior", "multilevel")
_LEVELS = 10  # a multilevel estimate uses up to 2^10 traces; what bias remains is that of 1,024 traces


@dataclass(frozen=True)
class TraceSets:
    """A DPO population at some theta and sampling temperature, ready for replicate samples.

    Attributes:
        oracle: The oracle with its scores in few coordinates.
        exact: Its exact moments.
        beta: DPO's beta.
        traces: K.
    """

    oracle: Oracle
    exact: ExactMoments
    beta: float
    traces: int

    @classmethod
    def of(cls, oracle: Oracle, beta: float, traces: int = 8) -> TraceSets:
        """Scores in an orthonormal basis of their span, and everything exact."""
        short = shortened(oracle)
        return cls(short, exact_moments(short, Objective(beta=beta)), beta, traces)

    @property
    def at_reference(self) -> bool:
        """Whether theta = theta_ref, where all margins vanish."""
        return self.oracle.config.drift == 0

    def unbiased(self, method: TraceMethod) -> bool:
        """Whether the method is free of bias by construction here (up to the cap on levels)."""
        exact_posterior = self.at_reference and self.oracle.config.temperature == 1.0
        return method == "multilevel" or (method in ("anchored", "posterior") and exact_posterior)

    def draw(
        self, shape: tuple[int, ...], method: TraceMethod, rng: np.random.Generator
    ) -> dict[str, Float[np.ndarray, "*shape dimensions"]]:
        """Independent examples: g_t, g_e, and m_hat, which shares the pair's own trace where it is the anchor.

        Args:
            shape: How many, e.g. (replicates, N).
            method: Estimator of m.
            rng: Decides everything.
        """
        oracle, n = self.oracle, math.prod(shape)
        table, answers = oracle.table, oracle.grammar.n_answers
        x = rng.integers(oracle.grammar.n_prompts, size=n)
        laws = (law.reshape(len(law), -1) for law in (oracle.pair_law, oracle.empty_pair_law))
        (a, b), (c, d) = (np.divmod(categorical(law, x, 1, rng)[:, 0], answers) for law in laws)
        own = [draw_posterior_traces(oracle, x, y, 1, rng)[:, 0] for y in (a, b)]
        responses, objective = trace_responses(table), Objective(beta=self.beta)
        zero = np.zeros_like(x)
        pairs = [((own[0], a), (own[1], b)), ((zero, c), (zero, d))]
        t, e = (
            self._mixed(x, (plus[1], minus[1]), tuple(_one_hot(r, table.trace_tokens.size) for r, _ in (plus, minus)),
                        _coefficients(objective, [(x, *plus), (x, *minus)], responses))
            for plus, minus in pairs
        )  # fmt: skip
        if method == "multilevel":
            m = self._mixed(x, (a, b), self._multilevel(x, (a, b), rng), None)
        else:
            sides = [self._draws(method, x, y, r, rng) for y, r in zip((a, b), own, strict=True)]
            disjoint = [self._draws("posterior" if method == "posterior" else "prior", x, y, None, rng) for y in (a, b)]
            shares = tuple(self._shares(x, y, r, method) for y, r in zip((a, b), sides, strict=True))
            m = self._mixed(x, (a, b), shares, self._coefficient(x, (a, b), disjoint, method))
        return {name: v.reshape(*shape, -1) for name, v in (("t", t), ("e", e), ("m", m))}

    def expected_m(self, method: TraceMethod) -> Float[np.ndarray, " dimensions"]:
        """E m_hat over the population, by enumeration of all multisets of traces; mu for unbiased methods."""
        if self.unbiased(method):
            return self.exact.mu
        oracle = self.oracle
        total = np.zeros_like(self.exact.mu)
        scores: dict[tuple[int, int], Array] = {}
        ratios: dict[tuple[int, int], tuple[Array, Array]] = {}
        for x, a, b in np.argwhere(oracle.pair_law > 0).tolist():
            for y in (a, b):
                if (x, y) not in scores:
                    scores[x, y] = self._expected_score(x, y, method)
                    ratios[x, y] = self._log_ratio_law(x, y, method)
            (p, up), (q, down) = ratios[x, a], ratios[x, b]
            weight = -self.beta * float(p @ expit(-self.beta * (up[:, None] - down[None, :])) @ q)
            total += oracle.pair_law[x, a, b] * weight * (scores[x, a] - scores[x, b])
        return total / len(oracle.pair_law)

    def truth(self, method: TraceMethod) -> Estimates:
        """What the estimates converge to: the exact values with mu replaced by E m_hat."""
        exact, mu = self.exact, self.expected_m(method)
        b_t, b_e = exact.mean_t - mu, exact.mean_e - mu
        values = vars(exact.estimates) | {
            "bias_trace_sq": np.asarray(b_t @ b_t),
            "bias_empty_sq": np.asarray(b_e @ b_e),
            "bias_cross": np.asarray(b_t @ b_e),
            "marginal_sq": np.asarray(mu @ mu),
            "trace_dot_marginal": np.asarray(exact.mean_t @ mu),
            "empty_dot_marginal": np.asarray(exact.mean_e @ mu),
        }
        return Estimates(**values)

    def predicted_shift(self, method: TraceMethod, tau: float) -> float:
        """``E(g_t - g_e) . bias / A(tau)``: how far a bias of mu moves alpha_unc, whatever the number of prompts."""
        exact = self.exact
        bias = self.expected_m(method) - exact.mu
        _, _, q0, q1 = exact.curve
        return float((exact.mean_t - exact.mean_e) @ bias) / (q0 + tau * q1)

    def _log_weights(self, x: Array, y: Array, traces: Array, method: str) -> tuple[Array, Array]:
        """Log w under theta and under the reference, ``[n, K]``, for traces of the prior or of q's posterior."""
        table = self.oracle.table
        rows, column = (x[:, None], traces, y[:, None]), (x[:, None], traces)
        proposal = table.sampling.joint[rows] if method == "posterior" else table.sampling.trace[column]
        return table.policy.joint[rows] - proposal, table.reference.joint[rows] - proposal

    def _draws(self, method: str, x: Array, y: Array, own: Array | None, rng: np.random.Generator) -> Array:
        if method == "posterior":
            return draw_posterior_traces(self.oracle, x, y, self.traces, rng)
        traces = draw_prior_traces(self.oracle, x, self.traces, rng)
        if method == "anchored" and own is not None:
            traces[:, 0] = own
        return traces

    def _shares(self, x: Array, y: Array, traces: Array, method: str) -> Array:
        """Normalised weight of every trace of the language in S_hat, ``[n, traces]``."""
        log_w, _ = self._log_weights(x, y, traces, method)
        weights = np.exp(log_w - log_w.max(axis=1, keepdims=True))
        return _spread(traces, weights / weights.sum(axis=1, keepdims=True), self.oracle.grammar.n_traces)

    def _mixed(
        self, x: Array, answers: tuple[Array, Array], shares: tuple[Array, ...], coefficient: Array | None
    ) -> Array:
        """``coefficient (shares_plus . s(., y+) - shares_minus . s(., y-))``, one product of matrices per (x, y)."""
        scores, found = self.oracle.table.scores, np.zeros((len(x), self.oracle.table.scores.shape[-1]))
        for y, share, sign in zip(answers, shares, (1.0, -1.0), strict=True):
            for question, answer in np.unique(np.stack([x, y]), axis=1).T.tolist():
                rows = np.flatnonzero((x == question) & (y == answer))
                found[rows] += sign * (share[rows] @ scores[question, :, answer])
        return found if coefficient is None else coefficient[:, None] * found

    def _log_ratio(self, x: Array, y: Array, traces: Array, method: str) -> Array:
        log_w, log_ref = self._log_weights(x, y, traces, method)
        return np.asarray(logsumexp(log_w, axis=1) - logsumexp(log_ref, axis=1))

    def _coefficient(self, x: Array, answers: tuple[Array, Array], traces: list[Array], method: str) -> Array:
        ratios = [self._log_ratio(x, y, r, method) for y, r in zip(answers, traces, strict=True)]
        return -self.beta * expit(-self.beta * (ratios[0] - ratios[1]))

    def _multilevel(self, x: Array, answers: tuple[Array, Array], rng: np.random.Generator) -> tuple[Array, Array]:
        """Single-term antithetic multilevel of the whole m_hat on prior traces, one random level an example.

        Returns:
            The coefficient of every trace's score, for y+ and (negated) for y-: ``[n, traces]`` each.
        """
        probabilities = level_probabilities(_LEVELS)
        level = 1 + rng.choice(_LEVELS, size=len(x), p=probabilities)
        n_traces = self.oracle.grammar.n_traces
        plus, minus = np.zeros((2, len(x), n_traces))
        for depth in np.unique(level).tolist():
            rows, size = np.flatnonzero(level == depth), 2**depth
            here, sides = x[rows], (answers[0][rows], answers[1][rows])
            traces = [draw_prior_traces(self.oracle, here, size, rng) for _ in sides]
            ground = self._single_traces(here, sides, traces)
            parts = [(slice(0, size), 1.0), (slice(0, size // 2), -0.5), (slice(size // 2, size), -0.5)]
            for k, total in enumerate((plus, minus)):
                total[rows] = ground[k]
            for part, factor in parts:
                chosen = [r[:, part] for r in traces]
                scale = factor / probabilities[depth - 1] * self._coefficient(here, sides, chosen, "prior")
                for total, y, r in zip((plus, minus), sides, chosen, strict=True):
                    total[rows] += scale[:, None] * self._shares(here, y, r, "prior")
        return plus, minus

    def _single_traces(self, x: Array, answers: tuple[Array, Array], traces: list[Array]) -> list[Array]:
        """Level 0: the mean over k of the estimate from the k-th trace of either side alone."""
        delta = self.oracle.table.log_ratio
        ratios = [delta[x[:, None], r, y[:, None]] for r, y in zip(traces, answers, strict=True)]
        coefficient = -self.beta * expit(-self.beta * (ratios[0] - ratios[1])) / traces[0].shape[1]
        return [_spread(r, coefficient, self.oracle.grammar.n_traces) for r in traces]

    def _expected_score(self, x: int, y: int, method: str) -> Array:
        table = self.oracle.table
        posterior, prior = table.sampling.posterior[x, :, y], np.exp(table.sampling.trace[x])
        n_traces = len(prior)
        w = np.exp(self._log_weights(np.array([x]), np.array([y]), np.arange(n_traces)[None], method)[0][0])
        drawn = posterior if method == "posterior" else prior
        anchor = posterior if method == "anchored" else None
        return expected_snis(drawn, w, table.scores[x, :, y], self.traces, anchor)

    def _log_ratio_law(self, x: int, y: int, method: str) -> tuple[Array, Array]:
        """Probabilities and values of log mean w - log mean w_ref on the disjoint set."""
        table = self.oracle.table
        kind = "posterior" if method == "posterior" else "prior"
        law = table.sampling.posterior[x, :, y] if kind == "posterior" else np.exp(table.sampling.trace[x])
        logs = self._log_weights(np.array([x]), np.array([y]), np.arange(len(law))[None], kind)
        counts, probability = multisets(law, self.traces)
        w, ref = (np.exp(part[0]) for part in logs)
        return probability, np.log(counts @ w) - np.log(counts @ ref)


def _coefficients(objective: Objective, where: list[tuple[Array, Array, Array]], responses: Scored) -> Array:
    """-beta sigmoid(-m) of each pair: the weight of its chosen score."""
    light = [without_scores(responses.log_prob[w], responses.log_ref[w], responses.tokens[w]) for w in where]
    return pair_weights(objective, light[0], light[1]).chosen


def _one_hot(traces: Array, n_traces: int) -> Array:
    return np.eye(n_traces)[traces]


def _spread(traces: Array, values: Array, n_traces: int) -> Array:
    """Sums values by trace: ``[n, K], [n, K] -> [n, traces]``."""
    flat = (traces + n_traces * np.arange(len(traces))[:, None]).ravel()
    return np.bincount(flat, values.ravel(), minlength=n_traces * len(traces)).reshape(len(traces), n_traces)
