"""Theorem 2, Corollary 1, Proposition 1: the parabola, its minimum, the window of a fixed alpha, and batch size."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from bvpo_stats.lab.oracle import Atoms, ExactMoments, population_atoms
from bvpo_stats.lab.theorems.ground import Ground, Sample, standard_error
from bvpo_stats.lab.theorems.report import STANDARD_ERRORS, Check, Numbers, TopicReport, judge
from bvpo_stats.statistics import MomentSummary, alpha_from_summary, summary_of_arrays
from bvpo_stats.statistics.estimates import Estimates, estimates
from bvpo_stats.statistics.proportions import Interval, jackknife_interval

Array = NDArray[np.float64]
PAPER = 0.5
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
SMALL = 20
"""Examples per sample where the bias of an estimate is tested: a V-statistic shows at small samples only."""
LARGE = BATCHES[-1]
"""The paper's batch size."""


def theorem2(ground: Ground) -> TopicReport:
    """The optimal weight, the parabola about it, domination, and the window of a fixed alpha.

    Args:
        ground: Oracles and samples.
    """
    exact, atoms, sample = ground.exact, ground.atoms, ground.sample
    summary = summary_of_arrays(sample.members)
    window = window_points(ground)
    return TopicReport(
        name="theorem2",
        title="Theorem 2 and Corollary 1: the optimal alpha",
        checks=(
            _minimiser(summary, exact),
            *_unbiased(sample, exact),
            _parabola(atoms, exact),
            _domination(window),
            _strict(atoms, exact),
            *_window(atoms, exact, window),
        ),
        data={
            "points": _measured_parabola(summary),
            "exact": [{"alpha": float(a), "value": exact.error(float(a))} for a in np.linspace(0, 1, 101)],
            "alpha_unc": exact.alpha_unc,
            "zero": float(exact.estimates.marginal_sq),
            "paper_alpha": PAPER,
            "window": window,
        },
    )


def proposition1(ground: Ground) -> TopicReport:
    """The mean squared error is squared bias plus variance, for single examples and for mini-batches.

    Args:
        ground: Oracles and samples.
    """
    exact, mse = ground.exact, brute_mse(ground.atoms)
    worst = max((0.0, 0.25, 0.5, 0.75, 1.0), key=lambda a: abs(mse(a) - _bias_plus_variance(exact, a)))
    return TopicReport(
        name="proposition1",
        title="Proposition 1 and equation (5): MSE = squared bias + variance",
        checks=(
            judge(
                "The MSE of g_c about mu is its squared bias plus its variance.",
                Numbers("E norm(g_c - mu)^2, worst of 5 alphas", mse(worst), _bias_plus_variance(exact, worst)),
                "Proposition 1, equation (5)",
                note="Left by brute force over the written-out population, right from the exact moments.",
            ),
            _mini_batch(ground),
        ),
    )


def brute_mse(atoms: Atoms) -> Callable[[float], float]:
    """Alpha to E norm(g_c - mu)^2, summed over the written-out population.

    Args:
        atoms: The population.
    """
    mu = atoms.expectation(lambda t, e, m: m)

    def mse(alpha: float) -> float:
        return float(atoms.expectation(lambda t, e, m: np.sum((alpha * t + (1 - alpha) * e - mu) ** 2, axis=-1)))

    return mse


def _bias_plus_variance(exact: ExactMoments, alpha: float) -> float:
    bias = exact.bias(alpha)
    return float(bias @ bias) + exact.variance(alpha)


def _mini_batch(ground: Ground, batch: int = 2) -> Check:
    """MSE of the mean of B examples, all tuples of a tiny population listed."""
    atoms = population_atoms(ground.tiny, ground.objective)
    t, e, probability = atoms.product()
    mixed, mu = PAPER * atoms.t[t] + (1 - PAPER) * atoms.e[e], atoms.expectation(lambda t, e, m: m)
    mse = sum(
        np.prod(probability[list(rows)]) * np.sum((mixed[list(rows)].mean(axis=0) - mu) ** 2)
        for rows in product(range(len(t)), repeat=batch)
    )
    exact = ground.tiny_exact
    bias = exact.bias(PAPER)
    return judge(
        "For a mini-batch of B examples the variance shrinks by B and the bias stays.",
        Numbers(f"MSE at B = {batch}, alpha = 0.5", float(mse), float(bias @ bias) + exact.variance(PAPER) / batch),
        "Proposition 1 with mini-batches",
        note=f"All {len(t) ** batch} batches of a tiny population listed.",
    )


def _minimiser(summary: MomentSummary, exact: ExactMoments) -> Check:
    """Alpha from drawn examples, by the package's estimator."""
    found, parts = alpha_from_summary(summary), estimates(summary)
    ratio = parts.numerator() / parts.denominator()
    return judge(
        "alpha_unc = [tr(Sigma_e - Sigma_te) + norm(b_e)^2 - b_t.b_e] / E norm(g_t - g_e)^2.",
        Numbers(
            f"alpha_unc from {summary.n_examples} examples",
            found.unclipped,
            exact.alpha_unc,
            STANDARD_ERRORS * standard_error(ratio, summary),
        ),
        "Theorem 2",
        note=f"{found.level:.0%} interval {found.unclipped_low:.3f} to {found.unclipped_high:.3f}.",
    )


def _unbiased(sample: Sample, exact: ExactMoments) -> tuple[Check, ...]:
    """Means of the estimates over many small samples: where a plug-in estimate shows its bias."""
    n = len(sample.prompt) // SMALL * SMALL
    members = {name: rows[:n].reshape(-1, SMALL, rows.shape[-1]) for name, rows in sample.members.items()}
    parts = estimates(summary_of_arrays(members))
    truth: Estimates = exact.estimates
    checks = []
    for label, values, true in (
        ("B, the numerator", parts.numerator(), truth.numerator()),
        ("norm(b_t)^2", parts.bias_trace_sq, truth.bias_trace_sq),
        ("norm(b_e)^2", parts.bias_empty_sq, truth.bias_empty_sq),
    ):
        first = np.asarray(values)[:, 0]
        error = float(np.std(first, ddof=1) / np.sqrt(len(first)))
        checks.append(
            judge(
                f"The U-statistic of {label} is unbiased at N = {SMALL}.",
                Numbers(f"mean over {len(first)} samples", float(first.mean()), float(true), STANDARD_ERRORS * error),
                "statistics of Theorem 2",
                note="A V-statistic (the diagonal left in) misses this by many standard errors.",
            )
        )
    return tuple(checks)


def _parabola(atoms: Atoms, exact: ExactMoments) -> Check:
    mse = brute_mse(atoms)
    lowest = mse(exact.alpha_unc)
    gaps = {a: (mse(a) - lowest, exact.A * (a - exact.alpha_unc) ** 2) for a in (-0.5, 0.0, 0.5, 1.0, 1.7)}
    measured, predicted = max(gaps.values(), key=lambda pair: abs(pair[0] - pair[1]))
    return judge(
        "MSE(alpha) = MSE(alpha_unc) + A (alpha - alpha_unc)^2, a parabola.",
        Numbers("excess MSE, worst of 5 alphas", measured, predicted),
        "Theorem 2, Appendix A.2",
    )


def window_points(ground: Ground) -> list[dict[str, float]]:
    """alpha_unc and the errors of both parts, of 0.5 and of alpha*, over populations and batch sizes.

    Args:
        ground: Oracles.
    """
    points = []
    for exact in [ground.exact, *(exact for _, exact in ground.family)]:
        for batch in BATCHES:
            tau = 1 / batch
            unc = exact.alpha(tau)
            errors = {"trace": exact.error(1.0, tau), "empty": exact.error(0.0, tau), "paper": exact.error(PAPER, tau)}
            best = exact.error(min(1.0, max(0.0, unc)), tau)
            points.append({"batch_size": batch, "alpha_unc": unc, "alpha_star": best, **errors})
    return points


def _domination(window: list[dict[str, float]]) -> Check:
    worst = max(p["alpha_star"] / min(p["trace"], p["empty"]) for p in window)
    return judge(
        "MSE(g_c(alpha*)) <= min{MSE(g_t), MSE(g_e)}.",
        Numbers(f"largest MSE(alpha*) / better part, {len(window)} populations x batches", worst, 1.0, relation="<="),
        "Theorem 2",
        note=f"Median saving {1 - np.median([p['alpha_star'] / min(p['trace'], p['empty']) for p in window]):.0%}.",
    )


def _strict(atoms: Atoms, exact: ExactMoments) -> Check:
    mse, star, unc = brute_mse(atoms), exact.alpha_star, exact.alpha_unc
    return judge(
        "With alpha* inside (0, 1), g_c(alpha*) strictly beats g_t, by A (1 - alpha*)^2.",
        Numbers(
            "MSE(g_t) - MSE(g_c(alpha*))",
            mse(1.0) - mse(star),
            exact.A * ((1 - unc) ** 2 - (star - unc) ** 2),
        ),
        "Corollary 1",
        note=f"Against g_e the margin is A alpha*^2 = {exact.A * (unc**2 - (star - unc) ** 2):.2g}.",
    )


def _window(atoms: Atoms, exact: ExactMoments, window: list[dict[str, float]]) -> tuple[Check, ...]:
    """Edges by root finding on the brute-force MSE; the sentence of the introduction; the rule for 0.5."""
    mse = brute_mse(atoms)
    unc, end = exact.alpha_unc, 0.0 if exact.alpha_unc < PAPER else 1.0
    far = 2.5 * unc if end == 0.0 else 2.5 * unc - 1.5
    edge = float(brentq(lambda a: mse(a) - mse(end), unc, far, xtol=1e-13))
    beats = [p["paper"] < min(p["trace"], p["empty"]) for p in window]
    inside = [0.25 < p["alpha_unc"] < 0.75 for p in window]
    loses = len(window) - sum(beats)
    return (
        judge(
            "The mix beats both parts exactly for alpha in (2 alpha_unc - 1, 2 alpha_unc).",
            Numbers("edge of the window, by root finding", edge, 2 * unc - end, 1e-8),
            "Theorem 2, consequence",
        ),
        judge(
            "alpha = 0.5 beats both parts iff alpha_unc lies in (1/4, 3/4).",
            Numbers(
                f"cases that break the rule, of {len(window)}",
                sum(a != b for a, b in zip(beats, inside, strict=True)),
                0,
            ),
            "Theorem 2, consequence",
            note=f"0.5 beats both parts in {sum(beats)} of {len(window)} populations x batch sizes.",
        ),
        judge(
            "The mix has a strictly better MSE than either part for any nontrivial mixture.",
            Numbers("cases where alpha = 0.5 does not", loses, 0),
            "Introduction, lines 67-69",
            should_hold=False,
            note="Too strong as printed: Theorem 2 says it of alpha* only.",
        ),
    )


def _measured_parabola(summary: MomentSummary) -> list[dict[str, float]]:
    parts = estimates(summary)
    rows = []
    for alpha in np.linspace(0, 1, 11):
        values = parts.error(float(alpha))
        rows.append(
            {"alpha": float(alpha), "value": float(values[0]), "standard_error": standard_error(values, summary)}
        )
    return rows


def batch_scaling(ground: Ground) -> TopicReport:
    """alpha(tau) against the best weight of real mini-batches, and the cost of leaving B out.

    Args:
        ground: Oracles and samples.
    """
    exact = ground.exact
    measured = {batch: best_weight_of_batches(ground.sample, exact, batch) for batch in BATCHES}
    z = {batch: (value - exact.alpha(1 / batch)) / error for batch, (value, error) in measured.items()}
    worst = max(BATCHES, key=lambda batch: abs(z[batch]))
    p0, p1, q0, q1 = exact.curve
    small, large = exact.alpha(1.0), exact.alpha(1 / LARGE)
    cost = exact.error(small, 1 / LARGE) / exact.error(large, 1 / LARGE)
    steps = np.diff([exact.alpha(1 / batch) for batch in BATCHES]) * np.sign(p0 / q0 - p1 / q1)
    return TopicReport(
        name="batch_size",
        title="Batch size: alpha is a curve",
        checks=(
            judge(
                "At batch size B the best alpha is (P0 + P1 / B) / (Q0 + Q1 / B).",
                Numbers(
                    f"alpha at B = {worst}, the worst of {len(BATCHES)} batch sizes",
                    measured[worst][0],
                    exact.alpha(1 / worst),
                    STANDARD_ERRORS * measured[worst][1],
                ),
                "Theorem 2 with mini-batches",
                note="Measured: the weight that minimises the error of drawn batches about mu.",
            ),
            judge(
                "The curve runs monotonically from the variance-only to the bias-only answer as B grows.",
                Numbers("smallest step towards the bias-only limit", float(steps.min()), 0.0, relation=">="),
                "alpha(tau) as a weighted average",
                note=f"From {p1 / q1:.2f} over {small:.2f} at B = 1 and {large:.2f} at {LARGE} to {p0 / q0:.2f}.",
            ),
            judge(
                "alpha* does not depend on the batch size.",
                Numbers(f"MSE at B = {LARGE} with the alpha of B = 1, over the least", cost, 1.0, 0.01, "<="),
                "as Theorem 2 is read when B is left out",
                should_hold=False,
                note=f"The alpha of single examples, {small:.2f}, costs {cost - 1:.0%} more at the paper's batch size.",
            ),
        ),
        data={
            "points": [{"batch_size": b, "value": measured[b][0], "standard_error": measured[b][1]} for b in BATCHES],
            "curve": [{"batch_size": float(b), "value": exact.alpha(1 / b)} for b in np.geomspace(0.25, 4096, 80)],
            "variance_only": p1 / q1,
            "bias_only": p0 / q0,
            "paper_batch_size": LARGE,
            "paper_alpha": 0.5,
        },
    )


def best_weight_of_batches(sample: Sample, exact: ExactMoments, batch: int) -> tuple[float, float]:
    """The alpha that minimises the mean of norm(batch mean of g_c - mu)^2 over drawn batches, and its standard error.

    With t, e the means of a batch, the error is quadratic in alpha, so the minimiser is
    sum (e - t).(e - mu) / sum norm(t - e)^2 over the batches.

    Args:
        sample: Drawn examples.
        exact: Where mu comes from.
        batch: B.
    """
    n = len(sample.prompt) // batch * batch
    t, e = (rows[:n].reshape(-1, batch, rows.shape[-1]).mean(axis=1) for rows in (sample.t, sample.e))
    parts = np.stack([np.sum((e - t) * (e - exact.mu), axis=1), np.sum((t - e) ** 2, axis=1)], axis=1)
    found: Interval = jackknife_interval(parts, lambda x: x[..., 0] / x[..., 1], level=0.6826894921)
    assert found.value is not None  # some examples always differ
    assert found.high is not None
    return found.value, found.high - found.value
