"""The marginal score from K traces: the bias of self-normalised importance sampling, and its absence when anchored."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from bvpo_stats.gradients.marginal import anchored_snis, predicted_snis_bias, snis
from bvpo_stats.lab.oracle import Oracle, expected_snis
from bvpo_stats.lab.oracle.trace_sets import TraceSets
from bvpo_stats.lab.theorems.checks import Check, Numbers, TopicReport, judge
from bvpo_stats.lab.theorems.ground import COOL, DRIFT, Ground

Array = NDArray[np.float64]
COUNTS = (1, 2, 4, 8, 16, 32)
MANY = 64
LISTED = 3
"""Traces per estimate where every ordered choice of traces is listed and put through the package's estimator."""


@dataclass(frozen=True)
class Side:
    """One (x, y): everything about its traces.

    Attributes:
        proposal: q(r | x), the sampling model's law of the trace.
        posterior: pi_theta(r | x, y).
        log_weights: log of pi_theta(r, y | x) / q(r | x).
        scores: s(r, y).
        target: S(y).
    """

    proposal: Array
    posterior: Array
    log_weights: Array
    scores: Array
    target: Array

    @classmethod
    def of(cls, oracle: Oracle, prompt: int, answer: int) -> Side:
        """Reads one side off the oracle's tables."""
        table = oracle.table
        return cls(
            proposal=np.exp(table.sampling.trace[prompt]),
            posterior=table.policy.posterior[prompt, :, answer],
            log_weights=table.policy.joint[prompt, :, answer] - table.sampling.trace[prompt],
            scores=table.scores[prompt, :, answer],
            target=table.marginal_scores[prompt, answer],
        )

    def bias(self, n_traces: int, *, anchored: bool) -> Array:
        """Exact bias with K traces."""
        anchor = self.posterior if anchored else None
        mean = expected_snis(self.proposal, np.exp(self.log_weights), self.scores, n_traces, anchor)
        return mean - self.target

    def listed_bias(self, n_traces: int, *, anchored: bool) -> Array:
        """The same through the package's estimator, every ordered choice of traces listed."""
        method, first = (anchored_snis, self.posterior) if anchored else (snis, self.proposal)
        laws = [first] + [self.proposal] * (n_traces - 1)
        total = np.zeros_like(self.target)
        for traces in product(range(len(self.proposal)), repeat=n_traces):
            chance = np.prod([law[r] for law, r in zip(laws, traces, strict=True)])
            total = total + chance * method(self.log_weights[list(traces)], self.scores[list(traces)])
        return total - self.target


def marginal_gradient(ground: Ground) -> TopicReport:
    """Bias of SNIS in K, its leading order, the anchored estimate, and what a bias does to alpha.

    Args:
        ground: Oracles.
    """
    few = ground.build(n_symbols=3, max_trace=1, temperature=COOL, drift=DRIFT, n_prompts=2)
    side = Side.of(few, 0, 1)
    scale = float(np.linalg.norm(side.target))
    curve = [_point(side, count, scale) for count in COUNTS]
    return TopicReport(
        name="marginal_gradient",
        title="The marginal gradient from K traces",
        checks=(*_listed(side, scale), _leading_order(side), _shift(few, ground.config.beta)),
        data={"curve": curve, "n_traces_of_the_language": len(side.proposal)},
    )


def _point(side: Side, n_traces: int, scale: float) -> dict[str, float]:
    leading = predicted_snis_bias(side.proposal, side.log_weights, side.scores, traces=n_traces).score
    return {
        "traces": n_traces,
        "snis": float(np.linalg.norm(side.bias(n_traces, anchored=False))) / scale,
        "leading_order": float(np.linalg.norm(leading)) / scale,
        "anchored": float(np.linalg.norm(side.bias(n_traces, anchored=True))) / scale,
    }


def _listed(side: Side, scale: float) -> tuple[Check, ...]:
    """The package's estimators over all choices of up to three traces."""
    plain = [side.listed_bias(k, anchored=False) for k in range(1, LISTED + 1)]
    anchored = [side.listed_bias(k, anchored=True) for k in range(1, LISTED + 1)]
    gap = plain[-1] - side.bias(LISTED, anchored=False)
    worst = max(float(np.linalg.norm(bias)) for bias in anchored) / scale
    first, last = (float(np.linalg.norm(bias)) / scale for bias in (plain[0], plain[-1]))
    return (
        judge(
            "Self-normalised importance sampling (SNIS) is unbiased.",
            Numbers(f"norm(bias) / norm(S), K = {LISTED}", last, 0.0),
            "Monte Carlo estimate of the marginal (Section 3.2)",
            should_hold=False,
            note=f"{first:.0%} at K = 1, {last:.0%} at K = {LISTED}; more prompts do not help.",
        ),
        judge(
            "Its bias at K traces is the one that listing all multisets of traces gives.",
            Numbers(f"norm(difference) / norm(S), K = {LISTED}", float(np.linalg.norm(gap)) / scale, 0.0),
            "exact bias of SNIS",
            note=f"{len(side.proposal) ** LISTED} ordered choices through the package's estimator.",
        ),
        judge(
            "Anchored SNIS (one exact posterior trace among the K) is unbiased at any K.",
            Numbers(f"largest norm(bias) / norm(S), K = 1 to {LISTED}", worst, 0.0),
            "invariance of i-SIR",
            note="At temperature 1 and theta_ref every generated response brings its own anchor.",
        ),
    )


def _leading_order(side: Side) -> Check:
    """K bias -> -E_q[w^2 (s - S)], seen along the predicted direction, where the remainder is of order 1/K."""
    leading = predicted_snis_bias(side.proposal, side.log_weights, side.scores, traces=1).score

    def remainder(count: int) -> float:
        return float(np.linalg.norm(count * side.bias(count, anchored=False) - leading))

    ratio = remainder(MANY // 2) / remainder(MANY)
    share = remainder(MANY) / float(np.linalg.norm(leading))
    return judge(
        "K times the bias tends to -E_q[w^2 (s - S)]; what is left halves as K doubles.",
        Numbers(f"remainder at K = {MANY // 2} over that at {MANY}", ratio, 2.0, 0.35),
        "leading order of the SNIS bias",
        note=f"At K = {MANY} the remainder is {share:.1%} of the leading term.",
    )


def _shift(oracle: Oracle, beta: float) -> Check:
    """Alpha with mu replaced by E m_hat, less alpha: E(g_t - g_e).bias / A."""
    sets = TraceSets.of(oracle, beta, traces=8)
    biased, tau = sets.truth("prior"), 1 / 128
    shifted = float(biased.numerator(tau) / biased.denominator(tau)) - sets.exact.alpha(tau)
    return judge(
        "A bias of the estimate of mu shifts alpha by E(g_t - g_e).bias / A, whatever the number of prompts.",
        Numbers("shift of alpha_unc at B = 128, prior traces, K = 8", shifted, sets.predicted_shift("prior", tau)),
        "bias of mu in Theorem 2",
        note=f"From {sets.exact.alpha(tau):.3f} to {sets.exact.alpha(tau) + shifted:.3f}.",
    )
