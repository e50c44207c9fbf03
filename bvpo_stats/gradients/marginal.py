"""The marginal gradient m of one prompt, as weights on the scores of its traces.

    m = chosen_weight(M) S(y+) + rejected_weight(M) S(y-),      S(y) = E_{r ~ pi_theta(r | x, y)} s(r, y),

with the margin M of the log-marginals (DPO: weights -+ beta sigmoid(-M)). Every estimator here replaces S by a
weighted mean of the scores of K traces, with w = pi_theta(r, y | x) / q(r), and M by

    log pi_theta(y | x) / pi_ref(y | x) = log sum_k w_k - log sum_k v_k,      v = pi_ref(r, y | x) / q(r),

so all of it is arithmetic on log-probabilities: the traces' scores are combined inside one backward and never stored.
With posterior traces of pi_ref (q proportional to pi_ref(r, y | x)) all v are equal and this is the ratio identity,
log mean exp(Delta). Normalisers of q cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective, PairLogps
from bvpo_stats.statistics.diagnostics import WeightDiagnostics, diagnose
from bvpo_stats.statistics.marginal import (
    antithetic_difference,
    jackknife,
    level_probabilities,
    log_mean_weight,
    multilevel,
)

Coefficients = tuple[Float[np.ndarray, " chosen_traces"], Float[np.ndarray, " rejected_traces"]]
Rows = Int[np.ndarray, " traces"]


@dataclass(frozen=True)
class SideTraces:
    """The traces of one answer y, in log-probabilities.

    Attributes:
        log_policy: log pi_theta(r, y | x).
        log_ref: log pi_ref(r, y | x).
        log_proposal: log q of each trace; up to a constant, except where ``normalised``.
        answer_tokens: Tokens of y.
        anchored: Whether trace 0 is a posterior draw while the others are draws of q.
        normalised: Whether q is the law of the traces with its normaliser, so that the mean of w estimates pi(y | x).
    """

    log_policy: Float[np.ndarray, " traces"]
    log_ref: Float[np.ndarray, " traces"]
    log_proposal: Float[np.ndarray, " traces"]
    answer_tokens: int
    anchored: bool = False
    normalised: bool = False

    def __post_init__(self) -> None:
        if not np.isfinite(self.log_weights).all():
            raise UserError("A trace has no finite log-weight; check trace_logp and joint_logp of the trace bank.")

    def __len__(self) -> int:
        return len(self.log_policy)

    @property
    def log_weights(self) -> Float[np.ndarray, " traces"]:
        """Log w."""
        return self.log_policy - self.log_proposal

    @property
    def log_ref_weights(self) -> Float[np.ndarray, " traces"]:
        """Log v."""
        return self.log_ref - self.log_proposal


@dataclass(frozen=True)
class SideDiagnostics:
    """Can the traces of one answer be trusted?

    Attributes:
        prompt_id: The prompt.
        side: Which answer of its D_t pair.
        weights: Effective size, largest weight, anchor gap, k-hat.
    """

    prompt_id: str
    side: Literal["chosen", "rejected"]
    weights: WeightDiagnostics


@dataclass(frozen=True)
class MarginalEstimator:
    """From the log-probabilities of a prompt's traces to the weights of their scores in m.

    Attributes:
        objective: The loss.
        method: ``anchored``, ``posterior`` and ``prior`` weigh all traces (which of the three is a matter of what the
            traces are); off theta_ref the margin and the scores take disjoint halves, both ways round, because their
            product would be biased otherwise. ``jackknife`` and ``multilevel`` work on the whole of m, both of its
            nonlinearities included, with trace k of one answer tied to trace k of the other. A bank of K traces ends
            the levels of ``multilevel`` at log2 K; E Delta_l halves from level to level, so the missing ones together
            are worth the last once more, which is added. Both have a bias of order 1 / K^2 then, of the plug-in's
            1 / K: unbiased would need banks without a largest size.
        at_reference: theta = theta_ref: every log-ratio is 0, and the margin with it.
    """

    objective: Objective
    method: Literal["anchored", "posterior", "prior", "jackknife", "multilevel"]
    at_reference: bool = False

    def __call__(self, chosen: SideTraces, rejected: SideTraces, rng: np.random.Generator) -> Coefficients:
        """Weights of the scores: m = sum_k c_k s(r+_k, y+) + sum_k c'_k s(r-_k, y-).

        Args:
            chosen: Traces of y+.
            rejected: Traces of y-.
            rng: Draws the level of ``multilevel``.

        Raises:
            UserError: Too few traces for the method, or an objective that needs a normaliser which they do not give.
        """
        if self.method in ("jackknife", "multilevel"):
            return self._debiased(chosen, rejected, rng)
        if self.margin_is_constant or min(len(chosen), len(rejected)) < 2 + chosen.anchored:
            everything = np.arange(len(chosen)), np.arange(len(rejected))
            return self.plug_in((chosen, rejected), everything, everything)
        first, second = zip(*(_margin_halves(side) for side in (chosen, rejected)), strict=True)
        terms = [self.plug_in((chosen, rejected), _others(chosen, rejected, half), half) for half in (first, second)]
        return (terms[0][0] + terms[1][0]) / 2, (terms[0][1] + terms[1][1]) / 2

    @property
    def margin_is_constant(self) -> bool:
        """Whether M needs no traces: at theta_ref, for objectives that contrast the policy with a reference."""
        return self.at_reference and self.objective.needs_reference

    def halves(self, chosen: SideTraces, rejected: SideTraces) -> tuple[Coefficients, Coefficients]:
        """The two m from the traces of even and of odd number, for the half-split diagnostic.

        A side with a single trace lends it to both halves.
        """
        splits = []
        for start in (0, 1):
            rows = [np.arange(start, len(side), 2) if len(side) > 1 else np.arange(1) for side in (chosen, rejected)]
            splits.append(self.plug_in((chosen, rejected), (rows[0], rows[1]), (rows[0], rows[1])))
        return splits[0], splits[1]

    def plug_in(
        self, sides: tuple[SideTraces, SideTraces], scores: tuple[Rows, Rows], margin: tuple[Rows, Rows]
    ) -> Coefficients:
        """Self-normalised weights of some traces for S, times the objective's weight at the margin of some traces."""
        weights = self._score_weights(sides, margin)
        found = []
        for side, rows, weight in zip(sides, scores, weights, strict=True):
            coefficients = np.zeros(len(side))
            log_weights = side.log_weights[rows]
            coefficients[rows] = weight * np.exp(log_weights - _log_sum_exp(log_weights))
            found.append(coefficients)
        return found[0], found[1]

    def _debiased(self, chosen: SideTraces, rejected: SideTraces, rng: np.random.Generator) -> Coefficients:
        traces = min(len(chosen), len(rejected))
        if traces < 2:
            raise UserError(
                f"The {self.method} estimator needs two traces for each answer; make a bank with more "
                "(`traces_per_answer`)."
            )

        def functional(rows: Rows) -> Float[np.ndarray, " both_sides"]:
            return np.concatenate(self.plug_in((chosen, rejected), (rows, rows), (rows, rows)))

        if self.method == "jackknife":
            found = jackknife(functional, traces)
        else:
            levels = int(np.log2(traces))
            probabilities = level_probabilities(levels)
            level = 1 + int(rng.choice(levels, p=probabilities))
            found = multilevel(functional, 2**level, level, levels=levels)
            if level == levels:
                found = found + antithetic_difference(functional, np.arange(2**level)) / probabilities[-1]
        return found[: len(chosen)], found[len(chosen) :]

    def _score_weights(self, sides: tuple[SideTraces, SideTraces], rows: tuple[Rows, Rows]) -> tuple[float, float]:
        """The objective's weights on S(y+) and S(y-) at the estimated margin."""
        policy, reference = [], [0.0, 0.0]
        for side, used in zip(sides, rows, strict=True):
            if self.objective.needs_reference:
                ratio = _log_sum_exp(side.log_weights[used]) - _log_sum_exp(side.log_ref_weights[used])
                policy.append(0.0 if self.margin_is_constant else ratio)
            else:
                drawn = used[1:] if side.anchored and used[0] == 0 else used
                policy.append(self._log_marginal(side, drawn))
        return score_weights(self.objective, policy, reference, [float(side.answer_tokens) for side in sides])

    def _log_marginal(self, side: SideTraces, rows: Rows) -> float:
        if not side.normalised or not len(rows):
            raise UserError(
                f"The objective {self.objective.name} needs log pi(y | x) itself, which only prior traces give; use "
                "`method='prior'` with a bank that has them."
            )
        return float(log_mean_weight(side.log_weights[rows]))


def score_weights(
    objective: Objective, policy: Sequence[float], reference: Sequence[float], tokens: Sequence[float]
) -> tuple[float, float]:
    """The objective's weights on the scores of one chosen and one rejected response.

    Args:
        objective: The loss.
        policy: Log-probabilities under pi_theta, chosen and rejected.
        reference: Log-probabilities under pi_ref.
        tokens: Lengths.
    """
    columns = [torch.tensor([value], dtype=torch.float64) for pair in (policy, tokens, reference) for value in pair]
    terms = objective(PairLogps(*columns))
    return float(terms.chosen_weight), float(terms.rejected_weight)


def diagnose_side(side: SideTraces, anchor: float | None = None) -> WeightDiagnostics:
    """Diagnostics of the weights of one answer.

    Effective size and largest weight are those of all weights in use; anchor gap and k-hat are about the draws of q.

    Args:
        side: Its traces.
        anchor: Log-weight of an exact posterior draw, where the traces have none among them.
    """
    if not side.anchored:
        return diagnose(side.log_weights, None if anchor is None else np.array([anchor]))
    used = diagnose(side.log_weights)
    if len(side) == 1:
        return used
    drawn = diagnose(side.log_weights[1:], side.log_weights[:1])
    return replace(drawn, traces=used.traces, effective_size=used.effective_size, largest=used.largest)


def _log_sum_exp(values: Float[np.ndarray, " traces"]) -> float:
    """scipy's, without its overhead: it is called several times for every prompt."""
    largest = values.max()
    return float(largest + np.log(np.exp(values - largest).sum()))


def _margin_halves(side: SideTraces) -> tuple[Rows, Rows]:
    """Two disjoint sets of traces to estimate the margin from; an anchor is left to the scores."""
    rows = np.arange(int(side.anchored), len(side))
    return rows[0::2], rows[1::2]


def _others(chosen: SideTraces, rejected: SideTraces, margin: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
    """The traces that the margin does not use."""
    return (
        np.setdiff1d(np.arange(len(chosen)), margin[0]),
        np.setdiff1d(np.arange(len(rejected)), margin[1]),
    )
