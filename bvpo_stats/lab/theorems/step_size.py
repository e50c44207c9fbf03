"""Theorem 4: which alpha is best for one SGD step, at eta L = 1 and below, every outcome of the step enumerated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from bvpo_stats.lab.oracle import Atoms, ExactMoments, MarginalLoss, population_atoms
from bvpo_stats.lab.theorems.checks import Check, Numbers, TopicReport, judge
from bvpo_stats.lab.theorems.ground import Ground

Array = NDArray[np.float64]
RHOS = (1.0, 0.5, 0.2, 0.05)
GRID = np.linspace(0, 1, 6)


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
        first = loss.hessian_ends(theta).smoothness
        ends = [theta - mean / first for mean in (exact.mean_t, exact.mean_e)]
        return cls(
            loss=loss,
            theta=theta,
            exact=exact,
            atoms=atoms,
            hessian_t=np.array([loss.product(theta, vector) for vector in atoms.t]),
            hessian_e=np.array([loss.product(theta, vector) for vector in atoms.e]),
            smoothness=max(first, *(loss.hessian_ends(end).smoothness for end in ends)),
        )

    def change(self, alpha: float, eta: float) -> float:
        """E L_m(theta - eta g_c) - L_m(theta), summed over every outcome."""
        if (alpha, eta) not in self._changes:
            t, e, probability = self.atoms.product()
            mixed = alpha * self.atoms.t[t] + (1 - alpha) * self.atoms.e[e]
            after = np.array([self.loss.value(self.theta - eta * vector) for vector in mixed])
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
    rows = [_row(step, rho) for rho in RHOS]
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


def _row(step: OneStep, rho: float) -> dict[str, float]:
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
