"""Sampled examples read off many copies at once: what a training step and a probe would see of them.

Everything here is data: prompts, best-of-n and worst-of-n pairs, and traces drawn from pi_ref given an answer. The data
do not depend on theta, only the gradients on them do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, logsumexp

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.lab.oracle.draws import Draws, draw_examples, draw_posterior_traces
from bvpo_stats.lab.oracle.ensemble import Copies
from bvpo_stats.lab.oracle.scored import ANSWER_TOKENS, Scored, pair_weights
from bvpo_stats.statistics.summary import Array

Side = tuple[Int[np.ndarray, "copies examples"], Int[np.ndarray, "copies examples"]]
"""(trace, answer) of one side of every pair."""


@dataclass(frozen=True)
class Pairs:
    """Examples of every copy, ``[copies, examples]`` each: a prompt, a D_t pair and a D_e pair."""

    prompt: Int[np.ndarray, "copies examples"]
    thinking: tuple[Side, Side]
    nothinking: tuple[Side, Side]

    @classmethod
    def of(cls, draws: Sequence[Draws]) -> Pairs:
        """Stacks draws of one size."""

        def side(mode: str, which: str) -> Side:
            found = [getattr(getattr(one, mode), which) for one in draws]
            return np.stack([trace for trace, _ in found]), np.stack([answer for _, answer in found])

        modes = [(side(mode, "chosen_pair"), side(mode, "rejected_pair")) for mode in ("thinking", "nothinking")]
        return cls(np.stack([one.prompt for one in draws]), modes[0], modes[1])

    def part(self, start: int, stop: int) -> Pairs:
        """A range of each copy's examples."""
        thinking, nothinking = (
            tuple((trace[:, start:stop], answer[:, start:stop]) for trace, answer in mode)
            for mode in (self.thinking, self.nothinking)
        )
        return Pairs(self.prompt[:, start:stop], thinking, nothinking)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Probe:
    """Held-out pairs with K traces an answer for the scores and K more, disjoint, for the margin.

    Attributes:
        pairs: The pairs.
        for_scores: Traces of pi_ref(r | x, y) of the chosen and the rejected answer, ``[copies, examples, K]`` each.
        for_margin: The same again.
    """

    pairs: Pairs
    for_scores: tuple[Int[np.ndarray, "copies examples K"], Int[np.ndarray, "copies examples K"]]
    for_margin: tuple[Int[np.ndarray, "copies examples K"], Int[np.ndarray, "copies examples K"]]


def draw_probe(oracle: Oracle, n_examples: int, traces: int, seeds: Sequence[Sequence[int]]) -> Probe:
    """A probe set for each copy, decided by its seed."""
    draws, sets = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        draws.append(draw_examples(oracle, n_examples, rng))
        answers = [pair[1] for pair in (draws[-1].thinking.chosen_pair, draws[-1].thinking.rejected_pair)]
        sets.append([draw_posterior_traces(oracle, draws[-1].prompt, y, traces, rng) for y in answers * 2])
    plus, minus, other_plus, other_minus = (np.stack(part) for part in zip(*sets, strict=True))
    return Probe(Pairs.of(draws), (plus, minus), (other_plus, other_minus))


def pair_vectors(
    oracle: Oracle, copies: Copies, pairs: Pairs, objective: Objective
) -> tuple[Float[np.ndarray, "copies examples parameters"], Float[np.ndarray, "copies examples parameters"]]:
    """g_t and g_e of each example."""
    table = oracle.table
    rows, x = np.arange(len(pairs.prompt))[:, None], pairs.prompt

    def scored(side: Side) -> Scored:
        trace, answer = side
        at = (rows, x, trace, answer)
        tokens = table.trace_tokens[trace] + float(ANSWER_TOKENS)
        return Scored(copies.joint[at], table.reference.joint[x, trace, answer], tokens, copies.scores[at])

    found = []
    for chosen, rejected in (pairs.thinking, pairs.nothinking):
        plus, minus = scored(chosen), scored(rejected)
        weights = pair_weights(objective, plus, minus)
        found.append(weights.chosen[..., None] * plus.scores + weights.rejected[..., None] * minus.scores)
    return found[0], found[1]


def marginal_vectors(
    oracle: Oracle, copies: Copies, probe: Probe, objective: Objective
) -> Float[np.ndarray, "copies examples parameters"]:
    """Estimated marginal gradient of each example from its 2 K traces a side.

    With ``w_k = pi_theta(r_k, y | x) / pi_ref(r_k, y | x)`` on traces of pi_ref given y: the score of y is the
    self-normalised mean of ``w_k s_k``, and ``log pi_theta(y | x) / pi_ref(y | x)`` the log of the mean of w on the
    disjoint set. Both are biased by O(1/K) away from theta_ref.
    """
    plus, minus = (
        replace(scored, log_prob=other.log_prob)
        for scored, other in zip(
            _marginal_sides(oracle, copies, probe, probe.for_scores),
            _marginal_sides(oracle, copies, probe, probe.for_margin),
            strict=True,
        )
    )
    found = pair_weights(objective, plus, minus)
    return found.chosen[..., None] * plus.scores + found.rejected[..., None] * minus.scores


def noise_curvature(
    oracle: Oracle,
    copies: Copies,
    probe: Probe,
    objective: Objective,
    noise: Float[np.ndarray, "copies vectors parameters"],
) -> tuple[Float[np.ndarray, " copies"], Float[np.ndarray, " copies"]]:
    """``sum_j u_j' H u_j`` and ``sum_j norm(u_j)^2`` over noise vectors u, H the Gauss-Newton Hessian of L_m.

    With ``D_i = S(y+) - S(y-)`` of probe example i and the second derivative ``l_i''`` of its loss in the margin,
    ``u' H u = mean_i l_i'' (D_i . u)^2``. The square is a product of two estimates of ``D_i . u`` from disjoint traces,
    for the square of one would count the noise of the traces as curvature.

    Args:
        oracle: Reference and data laws.
        copies: The scores.
        probe: Held-out pairs with traces.
        objective: DPO.
        noise: Deviations of single examples' gradients from their mean, from other data than the probe's.

    Raises:
        UserError: A loss other than DPO.
    """
    if objective.name != "dpo":
        raise UserError("the Gauss-Newton curvature is written out for DPO only; choose the sigmoid loss.")
    sets = (probe.for_scores, probe.for_margin)
    sides = [_marginal_sides(oracle, copies, probe, traces) for traces in sets]
    margins = [objective.beta * ((p.log_prob - p.log_ref) - (m.log_prob - m.log_ref)) for p, m in sides]
    second = objective.beta**2 * np.mean([expit(z) * expit(-z) for z in margins], axis=0)
    one, two = (np.einsum("nid,njd->nij", p.scores - m.scores, noise) for p, m in sides)
    curved = np.einsum("ni,nij,nij->n", second, one, two) / second.shape[1]
    return curved, np.einsum("njd,njd->n", noise, noise)


def _marginal_sides(oracle: Oracle, copies: Copies, probe: Probe, traces: tuple[Array, Array]) -> tuple[Scored, Scored]:
    """Log pi(y | x) and S(y) of both answers of every pair, estimated from one set of traces."""
    table, x = oracle.table, probe.pairs.prompt
    rows = np.arange(len(x))[:, None, None]
    sides = []
    for (_, answer), r in zip(probe.pairs.thinking, traces, strict=True):
        there = (x[..., None], r, answer[..., None])
        log_w = copies.joint[(rows, *there)] - table.reference.joint[there]
        total = logsumexp(log_w, axis=-1)
        scores = np.einsum("nik,nikd->nid", np.exp(log_w - total[..., None]), copies.scores[(rows, *there)])
        log_ref = table.reference.marginal[x, answer]
        tokens = np.full(log_ref.shape, float(ANSWER_TOKENS))
        sides.append(Scored(log_ref + total - np.log(r.shape[-1]), log_ref, tokens, scores))
    return sides[0], sides[1]
