"""Exact moments of g_t, g_e and the marginal gradient m: sums over traces, over the data, over the whole population.

Independent of the package's statistics and of the samples of `bvpo_stats.lab.oracle.draws`: each checks the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective, PairLogps
from bvpo_stats.lab.oracle.build import Oracle, SequenceTable, shortened
from bvpo_stats.lab.oracle.language import ANSWER_TOKENS
from bvpo_stats.statistics.estimates import Estimates

DPO = Objective()
"""The default objective."""

Array = NDArray[np.float64]
Values = Callable[[Array, Array, Array], Array]
"""A function of the vectors (t, e, m) of many examples."""
Cell = tuple[int, int, int]
"""A prompt x with the answers y+ and y- of a pair, by number."""


@dataclass(frozen=True)
class Scored:
    """Any number of responses, in any shape; indexing selects responses.

    Attributes:
        log_prob: Log-probability under pi_theta.
        log_ref: Log-probability under pi_ref.
        tokens: Length in tokens.
        scores: Gradient of ``log_prob``.
    """

    log_prob: Float[np.ndarray, "*responses"]
    log_ref: Float[np.ndarray, "*responses"]
    tokens: Float[np.ndarray, "*responses"]
    scores: Float[np.ndarray, "*responses parameters"]

    def __getitem__(self, index: object) -> Scored:
        fields = (self.log_prob, self.log_ref, self.tokens, self.scores)
        return Scored(*(np.asarray(field[index]) for field in fields))  # type: ignore[call-overload]


def without_scores(log_prob: Array, log_ref: Array, tokens: Array) -> Scored:
    """Responses for `pair_weights`, which needs no scores."""
    return Scored(log_prob, log_ref, tokens, np.zeros((*log_prob.shape, 0)))


@dataclass(frozen=True)
class PairWeights:
    """An objective on pairs: grad loss = chosen * s(chosen) + rejected * s(rejected).

    Attributes:
        loss: Loss of each pair.
        chosen: Weight of the chosen response's score.
        rejected: Weight of the rejected response's score.
    """

    loss: Float[np.ndarray, "*pairs"]
    chosen: Float[np.ndarray, "*pairs"]
    rejected: Float[np.ndarray, "*pairs"]


def trace_responses(table: SequenceTable) -> Scored:
    """All (r, y) as [prompts, traces, answers]; trace 0 is the empty one, as in D_e."""
    log_prob = table.policy.joint
    tokens = np.broadcast_to(table.trace_tokens[None, :, None] + float(ANSWER_TOKENS), log_prob.shape)
    return Scored(log_prob, table.reference.joint, tokens, table.scores)


def marginal_responses(table: SequenceTable) -> Scored:
    """All y with their traces summed out, as [prompts, answers]; a length is that of the answer."""
    log_prob = table.policy.marginal
    tokens = np.full(log_prob.shape, float(ANSWER_TOKENS))
    return Scored(log_prob, table.reference.marginal, tokens, table.marginal_scores)


def pair_weights(objective: Objective, chosen: Scored, rejected: Scored) -> PairWeights:
    """The package's objective on pairs of responses whose shapes broadcast.

    Args:
        objective: The loss.
        chosen: Chosen responses.
        rejected: Rejected responses.
    """
    sides = [[side.log_prob, side.log_ref, side.tokens] for side in (chosen, rejected)]
    shape = np.broadcast_shapes(chosen.log_prob.shape, rejected.log_prob.shape)
    flat = [[torch.tensor(np.broadcast_to(part, shape).ravel()) for part in side] for side in sides]
    (log_plus, ref_plus, n_plus), (log_minus, ref_minus, n_minus) = flat
    terms = objective(PairLogps(log_plus, log_minus, n_plus, n_minus, ref_plus, ref_minus))
    values = (terms.loss, terms.chosen_weight, terms.rejected_weight)
    return PairWeights(*(value.numpy().reshape(shape) for value in values))


def pair_gradients(
    objective: Objective, chosen: Scored, rejected: Scored
) -> tuple[Float[np.ndarray, "*pairs parameters"], Float[np.ndarray, "*pairs"]]:
    """Gradient and loss of each pair, pairs matched one to one.

    Args:
        objective: The loss.
        chosen: Chosen responses.
        rejected: Rejected responses, in the same shape.
    """
    weights = pair_weights(objective, chosen, rejected)
    gradient = weights.chosen[..., None] * chosen.scores + weights.rejected[..., None] * rejected.scores
    return gradient, weights.loss


@dataclass(frozen=True)
class CellMoments:
    """Moments given the prompt x and the answers (y+, y-): the level at which Theorem 1 conditions.

    Indices [x, a, b] stand for prompt x, y+ = a, y- = b. Cells of probability 0 hold zeros.

    Attributes:
        pair_law: P(y+ = a, y- = b | x) in D_t.
        mean_t: E[g_t | x, y+, y-] over the traces r+, r-.
        square_t: E[norm(g_t)^2 | x, y+, y-].
        marginal: m, the gradient of the marginal loss of the pair.
        empty_pair_law: P(y'+ = a, y'- = b | x) in D_e.
        empty: g_e, which no trace enters.
        loss_t: E[l_t | x, y+, y-].
        loss_m: Marginal loss of the pair.
        loss_e: Empty-trace loss of the pair.
    """

    pair_law: Float[np.ndarray, "prompts answers answers"]
    mean_t: Float[np.ndarray, "prompts answers answers parameters"]
    square_t: Float[np.ndarray, "prompts answers answers"]
    marginal: Float[np.ndarray, "prompts answers answers parameters"]
    empty_pair_law: Float[np.ndarray, "prompts answers answers"]
    empty: Float[np.ndarray, "prompts answers answers parameters"]
    loss_t: Float[np.ndarray, "prompts answers answers"]
    loss_m: Float[np.ndarray, "prompts answers answers"]
    loss_e: Float[np.ndarray, "prompts answers answers"]


def cell_moments(oracle: Oracle, objective: Objective = DPO) -> CellMoments:
    """The conditional moments of every cell (x, y+, y-).

    Sums over trace pairs are matrix products over the two trace axes: no pair's gradient is ever formed.

    Args:
        oracle: The policy at theta, its reference and its data laws.
        objective: The preference loss; its marginal form has log pi(y | x) for the log-probability of a response.
    """
    responses, marginals = trace_responses(oracle.table), marginal_responses(oracle.table)
    cells, n_parameters = oracle.pair_law.shape, responses.scores.shape[-1]
    mean_t, marginal, empty = (np.zeros((*cells, n_parameters)) for _ in range(3))
    square_t, loss_t, loss_m, loss_e = (np.zeros(cells) for _ in range(4))
    posterior = oracle.table.sampling.posterior
    for cell in np.argwhere(oracle.pair_law > 0):
        x, a, b = cell.tolist()
        laws = posterior[x, :, a], posterior[x, :, b]
        moments = trace_pair_moments(laws, responses[x, :, a], responses[x, :, b], objective)
        mean_t[x, a, b], square_t[x, a, b], loss_t[x, a, b] = moments
    x, a, b = where = np.nonzero(oracle.pair_law > 0)
    marginal[where], loss_m[where] = pair_gradients(objective, marginals[x, a], marginals[x, b])
    x, a, b = where = np.nonzero(oracle.empty_pair_law > 0)
    empty[where], loss_e[where] = pair_gradients(objective, responses[x, 0, a], responses[x, 0, b])
    return CellMoments(
        pair_law=oracle.pair_law,
        mean_t=mean_t,
        square_t=square_t,
        marginal=marginal,
        empty_pair_law=oracle.empty_pair_law,
        empty=empty,
        loss_t=loss_t,
        loss_m=loss_m,
        loss_e=loss_e,
    )


def trace_pair_moments(
    laws: tuple[Float[np.ndarray, " traces"], Float[np.ndarray, " traces"]],
    chosen: Scored,
    rejected: Scored,
    objective: Objective,
) -> tuple[Float[np.ndarray, " parameters"], float, float]:
    r"""E g_t, E norm(g_t)^2 and E l_t over independent traces r+ and r-.

    With p_ij = q(i) q(j), score weights u_ij and v_ij, and g_ij = u_ij s_i + v_ij s_j,

        E g_t         = sum_i (sum_j p_ij u_ij) s_i + sum_j (sum_i p_ij v_ij) s_j
        E norm(g_t)^2 = sum_i (sum_j p_ij u_ij^2) norm(s_i)^2 + sum_j (sum_i p_ij v_ij^2) norm(s_j)^2
                        + 2 sum_ij p_ij u_ij v_ij s_i . s_j.

    Args:
        laws: q(r | x, y+) and q(r | x, y-), the laws of the traces in the data.
        chosen: (r, y+) for every trace r.
        rejected: (r, y-) for every trace r.
        objective: The preference loss.
    """
    p, q = laws
    plus, minus = chosen.scores, rejected.scores
    weights = pair_weights(objective, chosen[:, None], rejected[None, :])
    u, v = weights.chosen, weights.rejected
    mean = (p * (u @ q)) @ plus + (q * (p @ v)) @ minus
    squares = (p * (u**2 @ q)) @ np.sum(plus**2, axis=1) + (q * (p @ v**2)) @ np.sum(minus**2, axis=1)
    mixed = p @ np.sum(plus * ((u * v) @ (q[:, None] * minus)), axis=1)
    return mean, float(squares + 2 * mixed), float(p @ weights.loss @ q)


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


@dataclass(frozen=True)
class Atoms:
    """Population of examples: a uniform prompt, then independently a D_t atom and a D_e atom of that prompt.

    Vectors are coordinates in an orthonormal basis of the span of all gradients, so every inner product is that of the
    full gradients, in far fewer dimensions; or the full gradients themselves.

    Attributes:
        t: g_t of each D_t atom (y+, r+, y-, r-).
        m: Marginal gradient of the atom's answers.
        t_prompt: Prompt of each D_t atom.
        t_probability: P(atom | prompt); sums to 1 over each prompt.
        e: g_e of each D_e atom (y'+, y'-).
        e_prompt: Prompt of each D_e atom.
        e_probability: P(atom | prompt).
    """

    t: Float[np.ndarray, "t_atoms dimensions"]
    m: Float[np.ndarray, "t_atoms dimensions"]
    t_prompt: Int[np.ndarray, " t_atoms"]
    t_probability: Float[np.ndarray, " t_atoms"]
    e: Float[np.ndarray, "e_atoms dimensions"]
    e_prompt: Int[np.ndarray, " e_atoms"]
    e_probability: Float[np.ndarray, " e_atoms"]

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return int(self.t_prompt.max()) + 1

    def draw(
        self, n_examples: int, rng: np.random.Generator
    ) -> tuple[Int[np.ndarray, " examples"], Int[np.ndarray, " examples"]]:
        """Indices (into ``t`` and ``m``, into ``e``) of independent examples.

        Args:
            n_examples: Number of examples.
            rng: Decides everything.
        """
        prompt = rng.integers(self.n_prompts, size=n_examples)
        return (
            _within(self.t_prompt, self.t_probability, prompt, rng),
            _within(self.e_prompt, self.e_probability, prompt, rng),
        )

    def product(
        self,
    ) -> tuple[Int[np.ndarray, " examples"], Int[np.ndarray, " examples"], Float[np.ndarray, " examples"]]:
        """The whole population: every (t index, e index) and its probability."""
        t_index, e_index, probability = [], [], []
        for prompt in range(self.n_prompts):
            ts, es = np.flatnonzero(self.t_prompt == prompt), np.flatnonzero(self.e_prompt == prompt)
            t_index.append(np.repeat(ts, len(es)))
            e_index.append(np.tile(es, len(ts)))
            probability.append(np.outer(self.t_probability[ts], self.e_probability[es]).ravel() / self.n_prompts)
        return np.concatenate(t_index), np.concatenate(e_index), np.concatenate(probability)

    def expectation(self, values: Values) -> Array:
        """E f(t, e, m) over the whole population.

        Args:
            values: f, mapping the vectors of all examples, one row each, to one number (or row) per example.
        """
        t, e, probability = self.product()
        return np.tensordot(probability, values(self.t[t], self.e[e], self.m[t]), axes=1)


def population_atoms(
    oracle: Oracle, objective: Objective = DPO, max_atoms: int = 200_000, *, full: bool = False
) -> Atoms:
    """Writes out every atom of the population.

    Args:
        oracle: A small oracle: D_t has traces^2 atoms per prompt and pair of answers.
        objective: The preference loss.
        max_atoms: Refuses to write out more.
        full: Keep the gradients in the coordinates of theta, as long as theta is.

    Raises:
        UserError: More than ``max_atoms`` D_t atoms; draw from the oracle instead (``draw_examples``).
    """
    n_atoms = int(np.sum(oracle.pair_law > 0)) * oracle.grammar.n_traces**2
    if n_atoms > max_atoms:
        raise UserError(
            f"The population has {n_atoms} D_t atoms, more than {max_atoms}. Build the oracle with fewer symbols or "
            "shorter traces, or draw examples instead of writing them all out."
        )
    oracle = oracle if full else shortened(oracle)
    cells = cell_moments(oracle, objective)
    responses = trace_responses(oracle.table)
    plus, minus = (index.ravel() for index in np.indices((oracle.grammar.n_traces,) * 2))
    t, m, t_prompt, t_probability = [], [], [], []
    for cell in np.argwhere(cells.pair_law > 0):
        x, a, b = cell.tolist()
        vectors, _ = pair_gradients(objective, responses[x, plus, a], responses[x, minus, b])
        posterior = oracle.table.sampling.posterior[x]
        t.append(vectors)
        m.append(np.broadcast_to(cells.marginal[x, a, b], vectors.shape))
        t_prompt.append(np.full(len(vectors), x))
        t_probability.append(cells.pair_law[x, a, b] * np.outer(posterior[:, a], posterior[:, b]).ravel())
    where = np.nonzero(cells.empty_pair_law > 0)
    return Atoms(
        t=np.concatenate(t),
        m=np.concatenate(m),
        t_prompt=np.concatenate(t_prompt),
        t_probability=np.concatenate(t_probability),
        e=cells.empty[where],
        e_prompt=where[0],
        e_probability=cells.empty_pair_law[where],
    )


def _within(
    owner: Int[np.ndarray, " atoms"],
    probability: Float[np.ndarray, " atoms"],
    prompt: Int[np.ndarray, " examples"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " examples"]:
    """One atom of each example's prompt, by inversion."""
    uniform = rng.random(len(prompt))
    index = np.zeros(len(prompt), dtype=np.int64)
    for x in np.unique(prompt):
        atoms = np.flatnonzero(owner == x)
        cumulative = np.cumsum(probability[atoms])
        drawn = np.searchsorted(cumulative, uniform[prompt == x] * cumulative[-1], side="right")
        index[prompt == x] = atoms[np.minimum(drawn, len(atoms) - 1)]
    return index


def posterior_covariance_product(
    oracle: Oracle, prompt: int, answer: int, direction: Float[np.ndarray, " parameters"]
) -> Float[np.ndarray, " parameters"]:
    """Cov_{r | x, y}(s) times a vector, over the policy's own posterior of the trace.

    Args:
        oracle: The policy at theta.
        prompt: Number of x.
        answer: Number of y.
        direction: The vector.
    """
    law, scores = oracle.table.policy.posterior[prompt, :, answer], oracle.table.scores[prompt, :, answer]
    centred = scores - law @ scores
    return (law * (centred @ direction)) @ centred


def drift_law(
    oracle: Oracle, cell: Cell, direction: Float[np.ndarray, " parameters"], beta: float
) -> Float[np.ndarray, " parameters"]:
    r"""Derivative at theta_ref of the bias of DPO's g_t in one cell, along a direction.

        b_t(theta_ref + delta) = (beta/2)(C+ - C-) delta + (beta^2/4)(C+ + C-) delta + O(norm(delta)^2),

    C+ and C- the covariances of the score over the traces of y+ and of y-. The first term is there because a sampled
    trace of the reference is no posterior draw of the policy any more, the second because the pair's weight
    sigmoid(-m) moves with the traces.

    Args:
        oracle: At theta_ref and sampling temperature 1, where the bias starts from 0.
        cell: (x, y+, y-).
        direction: delta.
        beta: DPO's beta.

    Raises:
        UserError: An oracle elsewhere.
    """
    if oracle.config.temperature != 1.0 or np.abs(oracle.table.log_ratio).max() > 1e-12:
        raise UserError("The drift law starts from theta_ref at temperature 1; build the oracle without drift.")
    x, a, b = cell
    plus, minus = (posterior_covariance_product(oracle, x, y, direction) for y in (a, b))
    return beta / 2 * (plus - minus) + beta**2 / 4 * (plus + minus)
