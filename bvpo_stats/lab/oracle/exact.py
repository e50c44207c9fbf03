"""Exact moments of g_t, g_e and the marginal gradient m, summed over the whole population of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.lab.oracle.cells import CellMoments, cell_moments
from bvpo_stats.lab.oracle.scored import DPO
from bvpo_stats.statistics.estimates import Estimates


@dataclass(frozen=True)
class ExactMoments:
    """Everything Theorems 1 to 4 speak of, exactly, for one example = one uniform prompt.

    Given the prompt, the D_t pair and the D_e pair are independent; m belongs to the answers of the D_t pair.

    Attributes:
        objective: The preference loss.
        mean_t: E g_t.
        mean_e: E g_e.
        mu: E m = grad L_m.
        square_tt: E norm(g_t)^2.
        square_ee: E norm(g_e)^2.
        square_mm: E norm(m)^2.
        product_te: E g_t . g_e.
        product_tm: E g_t . m.
        product_em: E g_e . m.
        trace_part: E Var_{r+-}(g_t | x, y+-), Theorem 1's conditional variance: the trace-sampling part of tr Sigma_t.
        within_prompt_t: E Var(g_t | x), the answers' sampling included.
        within_prompt_e: E Var(g_e | x).
        loss_t: L_t.
        loss_e: L_e.
        loss_m: L_m.
        cells: The conditional moments below it all.
    """

    objective: Objective
    mean_t: Float[np.ndarray, " parameters"]
    mean_e: Float[np.ndarray, " parameters"]
    mu: Float[np.ndarray, " parameters"]
    square_tt: float
    square_ee: float
    square_mm: float
    product_te: float
    product_tm: float
    product_em: float
    trace_part: float
    within_prompt_t: float
    within_prompt_e: float
    loss_t: float
    loss_e: float
    loss_m: float
    cells: CellMoments

    @property
    def b_t(self) -> Float[np.ndarray, " parameters"]:
        """Bias of g_t."""
        return self.mean_t - self.mu

    @property
    def b_e(self) -> Float[np.ndarray, " parameters"]:
        """Bias of g_e."""
        return self.mean_e - self.mu

    @property
    def tr_sigma_t(self) -> float:
        """Tr Cov(g_t)."""
        return self.square_tt - float(self.mean_t @ self.mean_t)

    @property
    def tr_sigma_e(self) -> float:
        """Tr Cov(g_e)."""
        return self.square_ee - float(self.mean_e @ self.mean_e)

    @property
    def tr_sigma_te(self) -> float:
        """Tr Cov(g_t, g_e); only the prompt connects the two."""
        return self.product_te - float(self.mean_t @ self.mean_e)

    @property
    def data_part(self) -> float:
        """Tr Cov(E[g_t | x, y+-]): what is left of tr Sigma_t when traces are averaged out."""
        cells = self.cells
        weights = cells.pair_law / len(cells.pair_law)
        centred = cells.mean_t - self.mean_t
        return float(np.sum(weights * np.sum(centred**2, axis=-1)))

    @property
    def A(self) -> float:  # noqa: N802
        """E norm(g_t - g_e)^2, the denominator of Theorem 2."""
        return self.square_tt - 2 * self.product_te + self.square_ee

    @property
    def B(self) -> float:  # noqa: N802
        """E <g_e - g_t, g_e - mu>, the numerator of Theorem 2."""
        return self.square_ee - self.product_te - float((self.mean_e - self.mean_t) @ self.mu)

    @property
    def alpha_unc(self) -> float:
        """B / A, Theorem 2's unconstrained minimiser."""
        return self.B / self.A

    @property
    def alpha_star(self) -> float:
        """Alpha_unc clipped to [0, 1]."""
        return min(1.0, max(0.0, self.alpha_unc))

    @property
    def estimates(self) -> Estimates:
        """The truth in the form of an estimate, 0-dimensional arrays: what acceptance tests compare with."""
        b_t, b_e, mu = self.b_t, self.b_e, self.mu
        values = {
            "bias_trace_sq": b_t @ b_t,
            "bias_empty_sq": b_e @ b_e,
            "bias_cross": b_t @ b_e,
            "var_trace": self.tr_sigma_t,
            "var_empty": self.tr_sigma_e,
            "var_cross": self.tr_sigma_te,
            "marginal_sq": mu @ mu,
            "trace_dot_marginal": self.mean_t @ mu,
            "empty_dot_marginal": self.mean_e @ mu,
            "trace_sq": self.mean_t @ self.mean_t,
            "empty_sq": self.mean_e @ self.mean_e,
            "trace_dot_empty": self.mean_t @ self.mean_e,
            "var_trace_sampling": self.trace_part,
            "within_trace": self.within_prompt_t,
            "within_empty": self.within_prompt_e,
        }
        return Estimates(**{name: np.asarray(value, dtype=np.float64) for name, value in values.items()})

    @property
    def curve(self) -> tuple[float, float, float, float]:
        """(P0, P1, Q0, Q1) of alpha(tau) = (P0 + tau P1) / (Q0 + tau Q1)."""
        b_t, b_e = self.b_t, self.b_e
        p1 = self.tr_sigma_e - self.tr_sigma_te
        q1 = self.tr_sigma_t + self.tr_sigma_e - 2 * self.tr_sigma_te
        return float(b_e @ b_e - b_t @ b_e), p1, float((b_t - b_e) @ (b_t - b_e)), q1

    def alpha(self, tau: float) -> float:
        """Minimiser of :meth:`error` at tau = eta L / B: batch size B and step size eta L enter through tau only."""
        p0, p1, q0, q1 = self.curve
        return (p0 + tau * p1) / (q0 + tau * q1)

    def bias(self, alpha: float) -> Float[np.ndarray, " parameters"]:
        """Bias of g_c = alpha g_t + (1 - alpha) g_e."""
        return alpha * self.b_t + (1 - alpha) * self.b_e

    def variance(self, alpha: float) -> float:
        """Tr Cov(g_c) of one example."""
        rest = 1 - alpha
        return alpha**2 * self.tr_sigma_t + 2 * alpha * rest * self.tr_sigma_te + rest**2 * self.tr_sigma_e

    def error(self, alpha: float, tau: float = 1.0) -> float:
        """norm(bias)^2 + tau Var: the MSE of a batch at tau = 1/B, Theorem 4's E_k at tau = eta L / B."""
        bias = self.bias(alpha)
        return float(bias @ bias) + tau * self.variance(alpha)


def exact_moments(oracle: Oracle, objective: Objective = DPO) -> ExactMoments:
    """Sums every moment over all prompts, answers and traces.

    Args:
        oracle: The policy at theta, its reference and its data laws.
        objective: The preference loss.
    """
    cells = cell_moments(oracle, objective)
    n_prompts = len(cells.pair_law)
    given_x_t = np.einsum("xab,xabd->xd", cells.pair_law, cells.mean_t)
    given_x_e = np.einsum("xab,xabd->xd", cells.empty_pair_law, cells.empty)
    given_x_m = np.einsum("xab,xabd->xd", cells.pair_law, cells.marginal)
    square_tt = float(np.sum(cells.pair_law * cells.square_t)) / n_prompts
    square_ee = float(np.sum(cells.empty_pair_law * np.sum(cells.empty**2, axis=-1))) / n_prompts
    cell_variance = cells.square_t - np.sum(cells.mean_t**2, axis=-1)

    def over_data(values: Float[np.ndarray, "prompts answers answers"]) -> float:
        return float(np.sum(cells.pair_law * values)) / n_prompts

    return ExactMoments(
        objective=objective,
        mean_t=given_x_t.mean(axis=0),
        mean_e=given_x_e.mean(axis=0),
        mu=given_x_m.mean(axis=0),
        square_tt=square_tt,
        square_ee=square_ee,
        square_mm=over_data(np.sum(cells.marginal**2, axis=-1)),
        product_te=float(np.sum(given_x_t * given_x_e)) / n_prompts,
        product_tm=over_data(np.sum(cells.mean_t * cells.marginal, axis=-1)),
        product_em=float(np.sum(given_x_e * given_x_m)) / n_prompts,
        trace_part=over_data(cell_variance),
        within_prompt_t=square_tt - float(np.sum(given_x_t**2)) / n_prompts,
        within_prompt_e=square_ee - float(np.sum(given_x_e**2)) / n_prompts,
        loss_t=over_data(cells.loss_t),
        loss_e=float(np.sum(cells.empty_pair_law * cells.loss_e)) / n_prompts,
        loss_m=over_data(cells.loss_m),
        cells=cells,
    )
