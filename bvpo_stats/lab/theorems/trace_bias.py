"""When is g_t unbiased? At theta_ref and temperature 1; not at another temperature, and less and less off theta_ref."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from bvpo_stats.lab.oracle import at, cell_moments, drift_law, exact_moments, shortened
from bvpo_stats.lab.theorems.checks import ROUNDING, STANDARD_ERRORS, Check, Numbers, TopicReport, judge
from bvpo_stats.lab.theorems.ground import COOL, Ground, draw_sample, standard_error
from bvpo_stats.statistics import summary_of_arrays
from bvpo_stats.statistics.estimates import estimates

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
STEPS = 2e-3 / 2.0 ** np.arange(5)
"""Steps off theta_ref, each half the one before."""


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
