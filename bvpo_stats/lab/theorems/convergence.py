"""Theorems 3 and 4: the convergence bound along real SGD trajectories, and the best alpha of one step.

Theorem 3 is checked in both of its forms with the smoothness L measured; Theorem 4 at eta L = 1 and below, with every
outcome of a step enumerated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize_scalar

from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle import (
    Atoms,
    ExactMoments,
    MarginalLoss,
    Oracle,
    at,
    draw_examples,
    exact_moments,
    example_gradients,
    population_atoms,
)
from bvpo_stats.lab.theorems.ground import COOL, Ground
from bvpo_stats.lab.theorems.report import Check, Numbers, TopicReport, Verdict, judge

Array = NDArray[np.float64]
Rule = Callable[[ExactMoments], float]

STEPS, PATHS, BATCH = 24, 3, 8
RHO = 0.15
"""eta L aimed at: L grows along the path by an amount that only the run itself shows."""
ATTEMPTS = 3
TIGHT = 1.5
"""A bound further than this factor from what it bounds is called loose."""
RHOS = (1.0, 0.5, 0.2, 0.05)
GRID = np.linspace(0, 1, 6)


@dataclass(frozen=True)
class Path:
    """One SGD trajectory with everything that Theorem 3 speaks of, exact at every iterate.

    Attributes:
        loss: L_m at theta_0 .. theta_K, ``[K + 1]``.
        gradient_sq: norm(grad L_m)^2, ``[K]``.
        bias_sq: norm(Bias_k)^2, ``[K]``.
        variance: Var_k(g_c) of the batch mean, ``[K]``.
        alpha: Mixing weights, ``[K]``.
        needed: The least L with which the descent lemma, equation (9), holds on every step taken.
        theta: Last iterate.
        middle: Iterate half-way.
    """

    loss: Array
    gradient_sq: Array
    bias_sq: Array
    variance: Array
    alpha: Array
    needed: float
    theta: Array
    middle: Array


@dataclass(frozen=True)
class Descent:
    """How the trajectories are made.

    Attributes:
        eta: Step size.
        steps: K.
        batch_size: B.
    """

    eta: float
    steps: int
    batch_size: int


def sgd_path(oracle: Oracle, objective: Objective, rule: Rule, descent: Descent, rng: np.random.Generator) -> Path:
    """Plain SGD on batches of the oracle's data with g_c = alpha_k g_t + (1 - alpha_k) g_e.

    Args:
        oracle: Where to start.
        objective: The loss.
        rule: alpha_k from the exact moments at theta_k.
        descent: Step size, number of steps, batch size.
        rng: Decides the batches.
    """
    rows, needed, middle = [], 0.0, oracle.theta
    exact = exact_moments(oracle, objective)
    losses = [exact.loss_m]
    for step in range(descent.steps):
        alpha = rule(exact)
        bias = exact.bias(alpha)
        rows.append((exact.mu @ exact.mu, bias @ bias, exact.variance(alpha) / descent.batch_size, alpha))
        t, e, _ = example_gradients(oracle, draw_examples(oracle, descent.batch_size, rng), objective)
        gradient = alpha * t.mean(axis=0) + (1 - alpha) * e.mean(axis=0)
        slope, size = float(exact.mu @ gradient), float(gradient @ gradient)
        oracle = at(oracle, oracle.theta - descent.eta * gradient)
        exact = exact_moments(oracle, objective)
        losses.append(exact.loss_m)
        needed = max(needed, 2 * (losses[-1] - losses[-2] + descent.eta * slope) / (descent.eta**2 * size))
        if step + 1 == descent.steps // 2:
            middle = oracle.theta
    gradient_sq, bias_sq, variance, alphas = np.array(rows).T
    return Path(np.array(losses), gradient_sq, bias_sq, variance, alphas, needed, oracle.theta, middle)


def bound_terms(path: Path, descent: Descent, smoothness: float) -> tuple[float, float, float, float]:
    """Left side and the parts of the right side of equation (3) along one path.

    Args:
        path: The trajectory.
        descent: How it was made.
        smoothness: L.

    Returns:
        Mean norm(grad L_m)^2; the descent term 2 (L_m(theta_0) - L_m(theta_K)) / (K eta); mean squared bias; eta L
        times the mean variance.
    """
    fall = 2 * float(path.loss[0] - path.loss[-1]) / (descent.steps * descent.eta)
    noise = descent.eta * smoothness * float(path.variance.mean())
    return float(path.gradient_sq.mean()), fall, float(path.bias_sq.mean()), noise


def theorem3(ground: Ground) -> TopicReport:
    """Equations (3) and (4) for alpha = 0, 0.5, 1 and the optimal alpha_k.

    Args:
        ground: Oracles.
    """
    oracle = ground.build(max_trace=2, n_prompts=2, temperature=COOL)
    loss = MarginalLoss(oracle, ground.objective)
    first = smoothness = loss.hessian_ends(oracle.theta).smoothness
    for _ in range(ATTEMPTS):  # again with smaller steps, where L outgrew the condition of the theorem
        descent = Descent(RHO / smoothness, STEPS, BATCH)
        paths = _paths(ground, oracle, descent)
        every = [path for group in paths.values() for path in group]
        met = [loss.hessian_ends(theta).smoothness for path in every for theta in (path.middle, path.theta)]
        smoothness = max(smoothness, *met)
        if descent.eta * smoothness <= 1:
            break
    rows = [_row(name, group, descent, smoothness) for name, group in paths.items()]
    return TopicReport(
        name="theorem3",
        title="Theorem 3: the convergence bound along SGD",
        checks=(
            _smooth(every, smoothness),
            _step_size(descent, first, smoothness),
            _first_form(rows),
            _second_form(rows),
        ),
        data={
            "rows": rows,
            "eta_l": descent.eta * smoothness,
            "smoothness": smoothness,
            "steps": STEPS,
            "batch_size": BATCH,
            "paths": PATHS,
        },
    )


def _paths(ground: Ground, oracle: Oracle, descent: Descent) -> dict[str, list[Path]]:
    """Trajectories of every rule on the same batches."""
    tau = RHO / descent.batch_size
    rules: dict[str, Rule] = {
        "0": lambda _: 0.0,
        "0.5": lambda _: 0.5,
        "1": lambda _: 1.0,
        "alpha_k": lambda exact: min(1.0, max(0.0, exact.alpha(tau))),
    }
    return {
        name: [sgd_path(oracle, ground.objective, rule, descent, ground.rng(50 + n)) for n in range(PATHS)]
        for name, rule in rules.items()
    }


def _row(name: str, group: list[Path], descent: Descent, smoothness: float) -> dict[str, float | str]:
    """Both sides of (3) and (4) for one rule, with the half-width of the 95% interval over trajectories."""
    terms = np.array([bound_terms(path, descent, smoothness) for path in group])
    left, fall, bias, noise = terms.mean(axis=0).tolist()
    gaps = terms[:, 1:].sum(axis=1) - terms[:, 0]
    q = float(stats.t.ppf(0.975, len(group) - 1)) / len(group) ** 0.5
    worst_bias = max(float(path.bias_sq.max()) for path in group)
    worst_variance = max(float(path.variance.max()) for path in group)
    crude = 2 * float(group[0].loss[0]) / (descent.steps * descent.eta)  # L* >= 0: the loss is positive
    return {
        "alpha": name,
        "mean_alpha": float(np.mean([path.alpha.mean() for path in group])),
        "gradient_sq": left,
        "gradient_sq_half": float(np.std(terms[:, 0], ddof=1)) * q,
        "descent": fall,
        "bias_sq": bias,
        "noise": noise,
        "bound": fall + bias + noise,
        "gap": float(gaps.mean()),
        "gap_half": float(np.std(gaps, ddof=1)) * q,
        "bound_half": float(np.std(terms[:, 1:].sum(axis=1), ddof=1)) * q,
        "uniform_bound": crude + worst_bias + descent.eta * smoothness * worst_variance,
    }


def _smooth(every: list[Path], smoothness: float) -> Check:
    needed = max(path.needed for path in every)
    return judge(
        "The descent lemma, equation (9), holds on every step with L the largest Hessian eigenvalue.",
        Numbers(f"least L that {len(every) * STEPS} steps need", needed, smoothness, 1e-6, "<="),
        "Theorem 3, equations (8) and (9)",
        verdict=_tightness(needed, smoothness),
        note=f"L by Lanczos at start, middle and end of the paths; the steps need {needed / smoothness:.0%} of it.",
    )


def _step_size(descent: Descent, first: float, smoothness: float) -> Check:
    return judge(
        "The step size obeys eta <= 1/L along the whole path.",
        Numbers("eta L with the L measured afterwards", descent.eta * smoothness, 1.0, relation="<="),
        "Theorem 3, condition",
        note=f"eta = {descent.eta:.3g}, L = {smoothness:.3g}; at the start of the path L was {first:.3g}.",
    )


def _first_form(rows: list[dict[str, float | str]]) -> Check:
    """The tightest of the four, its gap's lower confidence limit above zero."""
    row = min(rows, key=lambda row: float(row["bound"]) / float(row["gradient_sq"]))
    left, bound, half = (float(row[key]) for key in ("gradient_sq", "bound", "gap_half"))
    factors = ", ".join(f"{row['alpha']}: {float(row['bound']) / float(row['gradient_sq']):.1f}" for row in rows)
    return judge(
        "Mean norm(grad L_m)^2 <= 2 (L_m(theta_0) - L_m(theta_K)) / (K eta) + mean of norm(Bias)^2 + eta L Var.",
        Numbers(f"mean norm(grad L_m)^2 at alpha = {row['alpha']}, the tightest", left, bound - half, 0.0, "<="),
        "Theorem 3, equation (3)",
        verdict=_tightness(left, bound),
        note=f"The bound less the half-width of its 95% interval. Bound / measured, by alpha: {factors}.",
    )


def _second_form(rows: list[dict[str, float | str]]) -> Check:
    row = min(rows, key=lambda row: float(row["uniform_bound"]) / float(row["gradient_sq"]))
    left, bound = float(row["gradient_sq"]), float(row["uniform_bound"])
    return judge(
        "The same with uniform bounds: 2 (L_m(theta_0) - L*) / (K eta) + B_c^2 + eta L sigma_c^2.",
        Numbers(f"mean norm(grad L_m)^2 at alpha = {row['alpha']}, the tightest", left, bound, 0.0, "<="),
        "Theorem 3, equation (4)",
        verdict=_tightness(left, bound),
        note=f"With L* = 0. {bound / left:.0f} times what it bounds after {STEPS} steps.",
    )


def _tightness(value: float, bound: float) -> Verdict:
    return "holds" if bound <= TIGHT * value else "loose"


@dataclass(frozen=True)
class OneStep:
    """One SGD step of a single example from a fixed theta, all its outcomes known.

    Attributes:
        loss: L_m as a function of theta.
        theta: Where the step starts.
        exact: Exact moments there.
        atoms: Every g_t and g_e, in the coordinates of theta.
        hessian_t: H g_t of every D_t atom.
        hessian_e: H g_e of every D_e atom.
        smoothness: L, the largest curvature met between theta and where the mean step leads.
    """

    loss: MarginalLoss
    theta: Array
    exact: ExactMoments
    atoms: Atoms
    hessian_t: Array
    hessian_e: Array
    smoothness: float
    _changes: dict[tuple[float, float], float] = field(default_factory=dict)

    @classmethod
    def of(cls, ground: Ground) -> OneStep:
        """Enumerates the step of the tiny oracle."""
        oracle, exact = ground.tiny, ground.tiny_exact
        loss, theta = MarginalLoss(oracle, ground.objective), oracle.theta
        atoms = population_atoms(oracle, ground.objective, full=True)
        first, hessian = loss.hessian_ends(theta).smoothness, loss.hessian(theta)
        ends = [theta - mean / first for mean in (exact.mean_t, exact.mean_e)]
        return cls(
            loss=loss,
            theta=theta,
            exact=exact,
            atoms=atoms,
            hessian_t=np.array([hessian(vector) for vector in atoms.t]),
            hessian_e=np.array([hessian(vector) for vector in atoms.e]),
            smoothness=max(first, *(loss.hessian_ends(end).smoothness for end in ends)),
        )

    def change(self, alpha: float, eta: float) -> float:
        """E L_m(theta - eta g_c) - L_m(theta), summed over every outcome."""
        if (alpha, eta) not in self._changes:
            t, e, probability = self.atoms.product()
            mixed = alpha * self.atoms.t[t] + (1 - alpha) * self.atoms.e[e]
            after = self.loss.values(self.theta - eta * mixed)
            self._changes[alpha, eta] = float(probability @ after) - self.exact.loss_m
        return self._changes[alpha, eta]

    def second_order(self, alpha: float, eta: float) -> float:
        """The same to second order: -eta mu.E g_c + eta^2/2 E[g_c' H g_c]."""
        t, e, probability = self.atoms.product()
        mixed, image = (
            alpha * trace[t] + (1 - alpha) * empty[e]
            for trace, empty in ((self.atoms.t, self.atoms.e), (self.hessian_t, self.hessian_e))
        )
        curvature = probability @ np.sum(mixed * image, axis=1)
        return float(-eta * self.exact.mu @ self._mean(alpha) + eta**2 / 2 * curvature)

    def bound(self, alpha: float, eta: float) -> float:
        """Equation (14): -eta/2 norm(mu)^2 + eta/2 norm(Bias)^2 + L eta^2/2 Var."""
        exact = self.exact
        error = exact.error(alpha, eta * self.smoothness)
        return eta / 2 * (error - float(exact.mu @ exact.mu))

    def kept_bound(self, alpha: float, eta: float) -> float:
        """The line before equation (14), with the term -(eta/2)(1 - eta L) norm(E g_c)^2 that it drops."""
        mean = self._mean(alpha)
        return self.bound(alpha, eta) - eta / 2 * (1 - eta * self.smoothness) * float(mean @ mean)

    def best(self, eta: float) -> float:
        """The alpha in [0, 1] with the least expected loss after the step.

        The expected loss is a parabola in alpha but for terms of third order in eta, so the vertex of the parabola
        through three of its values competes with the two ends.
        """
        low, middle, high = (self.change(alpha, eta) for alpha in (0.0, 0.5, 1.0))
        curvature, slope = 2 * (low - 2 * middle + high), 4 * middle - 3 * low - high
        vertex = _clip(-slope / (2 * curvature)) if curvature > 0 else 0.0
        return min((0.0, vertex, 1.0), key=lambda alpha: self.change(alpha, eta))

    def _mean(self, alpha: float) -> Array:
        return alpha * self.exact.mean_t + (1 - alpha) * self.exact.mean_e


def theorem4(ground: Ground) -> TopicReport:
    """The MSE-optimal weight and the step: equal at eta L = 1 in the bound, and what changes below.

    Args:
        ground: Oracles.
    """
    step = OneStep.of(ground)
    rows = [_criteria_row(step, rho) for rho in RHOS]
    return TopicReport(
        name="theorem4",
        title="Theorem 4: the best alpha of an SGD step",
        checks=(
            _at_one(step),
            _valid(step),
            _below_one(rows),
            _kept(step),
            _third_order(step),
            _loss_itself(rows),
        ),
        data={"rows": rows, "smoothness": step.smoothness, "curves": [_curve(step, rho) for rho in (1.0, 0.2)]},
    )


def _criteria_row(step: OneStep, rho: float) -> dict[str, float]:
    """Weights that different criteria call best at one step size, and what each does to the expected loss."""
    eta = rho / step.smoothness
    top, bottom = (float(part) for part in step.exact.estimates.alpha_j_parts(rho))
    weights = {
        "mse": step.exact.alpha_star,
        "bound": _clip(step.exact.alpha(rho)),
        "kept_bound": _clip(top / bottom),
        "loss": step.best(eta),
    }
    changes = {f"change_{name}": step.change(weight, eta) for name, weight in weights.items()}
    return {"rho": rho, **weights, **changes}


def _curve(step: OneStep, rho: float) -> dict[str, Any]:
    eta = rho / step.smoothness
    return {
        "rho": rho,
        "alpha": GRID.tolist(),
        "change": [step.change(a, eta) for a in GRID],
        "bound": [step.bound(a, eta) for a in GRID],
        "kept_bound": [step.kept_bound(a, eta) for a in GRID],
    }


def _at_one(step: OneStep) -> Check:
    """The minimiser of E_k found numerically, from the moments of the written-out gradients."""
    atoms, mu = step.atoms, step.exact.mu

    def per_step_error(alpha: float) -> float:
        mean = atoms.expectation(lambda t, e, m: alpha * t + (1 - alpha) * e)
        spread = atoms.expectation(lambda t, e, m: np.sum((alpha * t + (1 - alpha) * e - mean) ** 2, axis=1))
        return float(np.sum((mean - mu) ** 2) + 1.0 * spread)

    found = minimize_scalar(per_step_error, bounds=(0, 1), method="bounded", options={"xatol": 1e-9})
    return judge(
        "At eta L = 1 the MSE-optimal alpha minimises E_k = norm(Bias)^2 + eta L Var.",
        Numbers("argmin of E_k over [0, 1]", float(found.x), step.exact.alpha_star, 1e-6),
        "Theorem 4, Appendix A.5",
        verdict="holds with limits",
        note="For single examples; with batches of B it is the alpha of tau = 1/B.",
    )


def _valid(step: OneStep) -> Check:
    """Equation (14) at every alpha and step size: expected loss by enumeration against its bound."""
    gaps = {}
    for rho in RHOS:
        eta = rho / step.smoothness
        for alpha in (0.0, 0.5, 1.0):
            change, bound = step.change(alpha, eta), step.bound(alpha, eta)
            gaps[rho, alpha] = (change - bound) / (eta / 2 * float(step.exact.mu @ step.exact.mu))
    rho, alpha = max(gaps, key=lambda key: gaps[key])
    return judge(
        "One step lowers the expected loss at least as far as equation (14) says, for every alpha.",
        Numbers(
            f"(E loss change - bound) / (eta/2 norm(mu)^2), largest of {len(gaps)}",
            gaps[rho, alpha],
            0.0,
            relation="<=",
        ),
        "equation (14)",
        verdict="loose" if gaps[rho, alpha] < -0.1 else "holds",
        note=f"Closest at eta L = {rho:g}, alpha = {alpha:g}: {-gaps[rho, alpha]:.1f} times eta/2 norm(mu)^2 to spare.",
    )


def _below_one(rows: list[dict[str, float]]) -> Check:
    row = min(rows, key=lambda row: row["rho"])
    return judge(
        "The MSE-optimal alpha minimises E_k at smaller steps too.",
        Numbers(f"argmin of E_k at eta L = {row['rho']:g}", row["bound"], row["mse"], 0.01),
        "as Theorem 4 is read when eta L = 1 is left out",
        should_hold=False,
        note="Smaller steps forgive variance: E_k asks for "
        + ", ".join(f"{r['bound']:.2f} at {r['rho']:g}" for r in rows)
        + ".",
    )


def _kept(step: OneStep) -> Check:
    """alpha_J, from the package, against a numerical minimum of the bound that keeps the dropped term."""
    rho = 0.5
    top, bottom = (float(part) for part in step.exact.estimates.alpha_j_parts(rho))
    around = top / bottom
    found = minimize_scalar(
        lambda a: step.kept_bound(a, rho / step.smoothness), bracket=(around - 1, around + 0.7), options={"xtol": 1e-9}
    )
    return judge(
        "Below eta L = 1 the bound with no term dropped is minimised by alpha_J.",
        Numbers("argmin of the kept bound at eta L = 0.5", float(found.x), around, 1e-5 * max(1.0, abs(around))),
        "Appendix A.3 before the term with (1 - eta L) is dropped",
        note=f"alpha_J = {around:.2f}, where E_k asks for {step.exact.alpha(rho):.2f}.",
    )


def _third_order(step: OneStep) -> Check:
    """Enumerated loss against its second-order form, with the true Hessian: the rest is of third order."""
    rests = []
    for rho in (0.1, 0.05):
        eta = rho / step.smoothness
        rests.append(abs(step.change(0.5, eta) - step.second_order(0.5, eta)))
    share = rests[-1] / abs(step.second_order(0.5, 0.05 / step.smoothness))
    return judge(
        "To second order the expected loss after a step is governed by the Hessian, not by L.",
        Numbers("fall of the remainder when eta is halved", rests[0] / rests[1], 8.0, 1.0),
        "Taylor expansion of E L_m(theta - eta g_c)",
        note=f"At eta L = 0.05 the remainder is {share:.1%} of the change.",
    )


def _loss_itself(rows: list[dict[str, float]]) -> Check:
    row = rows[0]
    lost = 1 - row["change_mse"] / row["change_loss"] if row["change_loss"] < 0 else float("nan")
    return judge(
        "The alpha that minimises the convergence error is the best alpha for the step itself.",
        Numbers("alpha with the least expected loss at eta L = 1", row["loss"], row["mse"], 0.02),
        "Section 4.3: 'precisely the one that is algorithmically optimal'",
        should_hold=False,
        note=f"E_k takes the worst curvature L for every direction; its choice forgoes {lost:.0%} of the fall in loss.",
    )


def _clip(alpha: float) -> float:
    return min(1.0, max(0.0, alpha))
