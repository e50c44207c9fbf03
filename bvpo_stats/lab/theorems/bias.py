"""Bias: of g_t off the reference point, and of the marginal gradient from K traces.

g_t is unbiased at theta_ref and temperature 1; not at another temperature, and less and less off theta_ref. The mean of
importance-weighted scores is biased by O(1/K) unless one of the traces is an exact posterior draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bvpo_stats.gradients.marginal import anchored_snis, predicted_snis_bias, snis
from bvpo_stats.lab.oracle import Oracle, at, cell_moments, drift_law, exact_moments, expected_snis, shortened
from bvpo_stats.lab.oracle.trace_sets import TraceSets
from bvpo_stats.lab.theorems.ground import COOL, DRIFT, Ground, draw_sample, standard_error
from bvpo_stats.lab.theorems.report import ROUNDING, STANDARD_ERRORS, Check, Numbers, TopicReport, judge
from bvpo_stats.statistics import summary_of_arrays
from bvpo_stats.statistics.estimates import estimates

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
STEPS = 2e-3 / 2.0 ** np.arange(5)
"""Steps off theta_ref, each half the one before."""
COUNTS = (1, 2, 4, 8, 16, 32)
MANY = 64
LISTED = 3
"""Traces per estimate where every ordered choice of traces is listed and put through the package's estimator."""
Array = NDArray[np.float64]


def reference_point(ground: Ground) -> TopicReport:
    """b_t at theta_ref, and what sampling temperature and best-of-n selection do to it.

    Args:
        ground: Oracles and samples.
    """
    curve = [relative_bias(ground, temperature) for temperature in TEMPERATURES]
    at_one = next(point for point in curve if point["temperature"] == 1.0)
    selected = max(relative_bias(ground, 1.0, n)["bias"] for n in (2, 9))
    return TopicReport(
        name="reference_point",
        title="b_t = 0 at the reference point, and the sampling temperature",
        checks=(
            judge(
                "At theta = theta_ref with traces sampled at temperature 1, E g_t = mu.",
                Numbers("norm(b_t) / norm(mu)", at_one["bias"], 0.0),
                "Fisher's identity at theta_ref",
                verdict="holds with limits",
                note="Needs temperature 1, no top-p, top-k or truncation; the paper samples at 0.8.",
            ),
            judge(
                "Choosing best and worst of n answers by a reward of the answer leaves b_t = 0.",
                Numbers("norm(b_t) / norm(mu), n = 2 and 9", selected, 0.0),
                "order statistics",
            ),
            _cooled(ground),
            _sampled(ground),
        ),
        data={"temperatures": curve, "paper_temperature": COOL},
    )


def relative_bias(ground: Ground, temperature: float, n_samples: int = 5) -> dict[str, float]:
    """norm(b_t) / norm(mu) at theta_ref, exact.

    Args:
        ground: Oracles.
        temperature: Sampling temperature of the traces.
        n_samples: n of best-of-n and worst-of-n.
    """
    exact = exact_moments(ground.build(temperature=temperature, n_samples=n_samples, max_trace=2), ground.objective)
    norm = float(np.linalg.norm(exact.mu))
    return {"temperature": temperature, "bias": float(np.linalg.norm(exact.b_t)) / norm}


def _cooled(ground: Ground) -> Check:
    bias = relative_bias(ground, COOL)["bias"]
    return judge(
        "At the paper's sampling temperature, 0.8, E g_t = mu as well.",
        Numbers("norm(b_t) / norm(mu)", bias, 0.0),
        "Section 5.1: responses sampled at temperature 0.8",
        should_hold=False,
        note=f"g_t starts with a bias of {bias:.1%} of the gradient, before any training.",
    )


def _sampled(ground: Ground) -> Check:
    """norm(b_t)^2 at temperature 0.8 from drawn examples, by the package's U-statistic."""
    oracle = shortened(ground.build(temperature=0.5, max_trace=2))
    exact = exact_moments(oracle, ground.objective)
    sample = draw_sample(oracle, ground.objective, ground.config.draws, ground.rng(2))
    summary = summary_of_arrays(sample.members)
    found = estimates(summary).bias_trace_sq
    return judge(
        "A U-statistic sees the bias that a low temperature causes.",
        Numbers(
            "norm(b_t)^2 at temperature 0.5",
            float(found[0]),
            float(exact.b_t @ exact.b_t),
            STANDARD_ERRORS * standard_error(found, summary),
        ),
        "statistics of Theorem 2",
        note="From drawn examples with the marginal gradients of their answers.",
    )


def drift(ground: Ground) -> TopicReport:
    """The drift law of b_t by step halving.

    Args:
        ground: Oracles.
    """
    oracle = ground.build(max_trace=2, n_prompts=1)
    x, a, b = np.argwhere(oracle.pair_law > 0)[0].tolist()
    direction = ground.rng(3).normal(size=oracle.theta.shape)
    law = drift_law(oracle, (x, a, b), direction, ground.config.beta)

    def bias(step: float) -> Any:
        cells = cell_moments(at(oracle, oracle.theta + step * direction), ground.objective)
        return cells.mean_t[x, a, b] - cells.marginal[x, a, b]

    found = [bias(step) for step in STEPS]
    errors = [float(np.linalg.norm(value - step * law)) for value, step in zip(found, STEPS, strict=True)]
    ratio = errors[-2] / errors[-1]
    length, slope = _norm(direction), _slope_at_zero(found)
    return TopicReport(
        name="drift",
        title="The drift law: how b_t grows off theta_ref",
        checks=(
            judge(
                "b_t = (beta/2)(C+ - C-) delta + (beta^2/4)(C+ + C-) delta to first order in delta.",
                Numbers("norm(slope of b_t - law) / norm(law)", _norm(slope - law) / _norm(law), 0.0, 1e-6),
                "drift law (first order)",
                verdict="holds with limits",
                note=f"Slope extrapolated from {len(STEPS)} steps; at norm(delta) = {STEPS[0] * length:.2g} the law is "
                f"off by {errors[0] / _norm(found[0]):.0%}.",
            ),
            judge(
                "What is left is of second order: it falls by 4 when the step is halved.",
                Numbers("ratio of the last two remainders", ratio, 4.0, 0.2),
                "drift law (remainder)",
            ),
        ),
        data={
            "steps": [
                {"distance": float(step * length), "bias": _norm(value), "law": float(step * _norm(law)), "rest": error}
                for step, value, error in zip(STEPS, found, errors, strict=True)
            ],
            "rounding": ROUNDING,
        },
    )


def _slope_at_zero(found: list[Any]) -> Any:
    """Derivative of the bias at step 0, by Richardson extrapolation of b(h)/h over halved steps."""
    slopes = [value / step for value, step in zip(found, STEPS, strict=True)]
    for order in 2.0 ** np.arange(1, len(STEPS)):
        slopes = [(order * fine - coarse) / (order - 1) for coarse, fine in pairwise(slopes)]
    return slopes[0]


def _norm(vector: Any) -> float:
    return float(np.linalg.norm(vector))


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
