"""Estimates of the marginal gradient from K sampled traces, thousands at a time, with their exact expectations.

For one example (x, y+, y-) an estimator draws K traces a side from a proposal and forms

    m_hat = -beta sigmoid(-M_hat) (S_hat(y+) - S_hat(y-)),

S_hat by self-normalised weights ``w = pi_theta(r, y | x) / q(r)``, and ``M_hat`` from ``log mean w - log mean w_ref`` of
a second, disjoint set. Traces are exchangeable, so expectations are sums over how often each trace was drawn
(multinomial counts), which the small oracle can list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, gammaln, logsumexp

from bvpo_stats.oracle.build import Oracle
from bvpo_stats.oracle.coordinates import shortened
from bvpo_stats.oracle.exact import ExactMoments, exact_moments
from bvpo_stats.oracle.scored import Objective, pair_gradients, trace_responses
from bvpo_stats.statistics.estimates import Estimates
from bvpo_stats.statistics.marginal import level_probabilities
from bvpo_stats.statistics.summary import Array

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
        a, b = np.divmod(_pick(oracle.pair_law.reshape(len(oracle.pair_law), -1)[x], rng), answers)
        c, d = np.divmod(_pick(oracle.empty_pair_law.reshape(len(oracle.pair_law), -1)[x], rng), answers)
        own = [_pick(table.sampling.posterior[x, :, y], rng) for y in (a, b)]
        responses, objective = trace_responses(table), Objective(beta=self.beta)
        t, _ = pair_gradients(objective, responses[x, own[0], a], responses[x, own[1], b])
        zero = np.zeros_like(x)
        e, _ = pair_gradients(objective, responses[x, zero, c], responses[x, zero, d])
        if method == "multilevel":
            m = self._multilevel(x, (a, b), rng)
        else:
            sides = [self._draws(method, x, y, r, rng) for y, r in zip((a, b), own, strict=True)]
            disjoint = [self._draws("posterior" if method == "posterior" else "prior", x, y, None, rng) for y in (a, b)]
            scores = [self._score(x, y, r, method) for y, r in zip((a, b), sides, strict=True)]
            m = self._coefficient(x, (a, b), disjoint, method)[:, None] * (scores[0] - scores[1])
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
        """log w under theta and under the reference, ``[n, K]``, for traces of the prior or of q's posterior."""
        table = self.oracle.table
        rows, column = (x[:, None], traces, y[:, None]), (x[:, None], traces)
        proposal = table.sampling.joint[rows] if method == "posterior" else table.sampling.trace[column]
        return table.policy.joint[rows] - proposal, table.reference.joint[rows] - proposal

    def _draws(self, method: str, x: Array, y: Array, own: Array | None, rng: np.random.Generator) -> Array:
        sampling = self.oracle.table.sampling
        law = sampling.posterior[x, :, y] if method == "posterior" else np.exp(sampling.trace[x])
        traces = _pick_many(law, self.traces, rng)
        if method == "anchored" and own is not None:
            traces[:, 0] = own
        return traces

    def _score(self, x: Array, y: Array, traces: Array, method: str) -> Array:
        log_w, _ = self._log_weights(x, y, traces, method)
        weights = np.exp(log_w - logsumexp(log_w, axis=1, keepdims=True))
        scores = self.oracle.table.scores
        found = np.zeros((len(x), scores.shape[-1]))
        for k in range(traces.shape[1]):
            found += weights[:, k, None] * scores[x, traces[:, k], y]
        return found

    def _log_ratio(self, x: Array, y: Array, traces: Array, method: str) -> Array:
        log_w, log_ref = self._log_weights(x, y, traces, method)
        return np.asarray(logsumexp(log_w, axis=1) - logsumexp(log_ref, axis=1))

    def _coefficient(self, x: Array, answers: tuple[Array, Array], traces: list[Array], method: str) -> Array:
        ratios = [self._log_ratio(x, y, r, method) for y, r in zip(answers, traces, strict=True)]
        return -self.beta * expit(-self.beta * (ratios[0] - ratios[1]))

    def _multilevel(self, x: Array, answers: tuple[Array, Array], rng: np.random.Generator) -> Array:
        """Single-term antithetic multilevel of the whole m_hat on prior traces, one random level an example."""
        probabilities = level_probabilities(_LEVELS)
        level = 1 + rng.choice(_LEVELS, size=len(x), p=probabilities)
        found = np.zeros((len(x), self.oracle.table.scores.shape[-1]))
        for depth in np.unique(level):
            rows, size = np.flatnonzero(level == depth), 2**depth
            here, sides = x[rows], (answers[0][rows], answers[1][rows])
            law = np.exp(self.oracle.table.sampling.trace[here])
            traces = [_pick_many(law, size, rng) for _ in sides]

            def whole(part: slice, here: Array = here, sides=sides, traces=traces) -> Array:  # type: ignore[no-untyped-def]
                chosen = [r[:, part] for r in traces]
                scores = [self._score(here, y, r, "prior") for y, r in zip(sides, chosen, strict=True)]
                return self._coefficient(here, sides, chosen, "prior")[:, None] * (scores[0] - scores[1])

            ground = sum(whole(slice(k, k + 1)) for k in range(size)) / size
            halves = (whole(slice(0, size // 2)) + whole(slice(size // 2, size))) / 2
            found[rows] = ground + (whole(slice(0, size)) - halves) / probabilities[depth - 1]
        return found

    def _expected_score(self, x: int, y: int, method: str) -> Array:
        table = self.oracle.table
        posterior, prior = table.sampling.posterior[x, :, y], np.exp(table.sampling.trace[x])
        n_traces = len(prior)
        w = np.exp(self._log_weights(np.array([x]), np.array([y]), np.arange(n_traces)[None], method)[0][0])
        scores, total = table.scores[x, :, y], np.zeros(table.scores.shape[-1])
        if method != "anchored":
            counts, probability = _multisets(posterior if method == "posterior" else prior, self.traces)
            return probability @ (counts * w @ scores / (counts @ w)[:, None])
        counts, probability = _multisets(prior, self.traces - 1)
        for anchor in range(n_traces):
            with_anchor = counts + np.eye(n_traces)[anchor]
            mean = (with_anchor * w) @ scores / (with_anchor @ w)[:, None]
            total = total + posterior[anchor] * (probability @ mean)
        return total

    def _log_ratio_law(self, x: int, y: int, method: str) -> tuple[Array, Array]:
        """Probabilities and values of log mean w - log mean w_ref on the disjoint set."""
        table = self.oracle.table
        kind = "posterior" if method == "posterior" else "prior"
        law = table.sampling.posterior[x, :, y] if kind == "posterior" else np.exp(table.sampling.trace[x])
        logs = self._log_weights(np.array([x]), np.array([y]), np.arange(len(law))[None], kind)
        counts, probability = _multisets(law, self.traces)
        w, ref = (np.exp(part[0]) for part in logs)
        return probability, np.log(counts @ w) - np.log(counts @ ref)


def _multisets(law: Array, size: int) -> tuple[Array, Array]:
    """Every way to draw ``size`` times: counts ``[ways, outcomes]`` and multinomial probabilities."""
    n = len(law)
    bars = np.array(list(combinations(range(size + n - 1), n - 1)))
    edges = np.concatenate([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), size + n - 1)], axis=1)
    counts = np.diff(edges, axis=1) - 1.0
    log_probability = gammaln(size + 1) - gammaln(counts + 1).sum(axis=1) + counts @ np.log(law)
    return counts, np.exp(log_probability)


def _pick(law: Float[np.ndarray, "rows outcomes"], rng: np.random.Generator) -> Int[np.ndarray, " rows"]:
    return _pick_many(law, 1, rng)[:, 0]


def _pick_many(
    law: Float[np.ndarray, "rows outcomes"], size: int, rng: np.random.Generator
) -> Int[np.ndarray, "rows size"]:
    """Independent outcomes of each row's law, by inversion."""
    cumulative = np.cumsum(law, axis=1)
    uniform = rng.random((len(law), size)) * cumulative[:, -1:]
    drawn = np.zeros(uniform.shape, dtype=np.int64)
    for edge in range(law.shape[1] - 1):
        drawn += uniform >= cumulative[:, edge, None]
    return drawn
