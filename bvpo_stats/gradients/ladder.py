"""Which estimator of the marginal gradient the data can bear, and the reason in a sentence."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.engine import Planner, RowRules, log_probs, sparse_rows
from bvpo_stats.gradients.examples import Example, SideBank
from bvpo_stats.gradients.marginal import MarginalDiagnostics, aggregate, select_traces
from bvpo_stats.gradients.options import MarginalMethod, StreamOptions
from bvpo_stats.gradients.reference import Reference
from bvpo_stats.model.policy import Policy
from bvpo_stats.progress import say

Rung = Literal["reference point", "posterior traces", "prior traces", "small drift", "not estimable", "asked for"]

PROBED_PROMPTS = 16
"""Prompts whose trace weights and drift are looked at before a method is chosen."""

SMALL_DRIFT = 0.3
"""Nats. Up to here the bound of `statistics.drift` on g_t's bias is at most e^(2 SMALL_DRIFT) = 1.8 times its first
order in the drift; on the oracle it then leaves a range of some 0.1 to 0.2 on either side of alpha* at B = 128."""


@dataclass(frozen=True)
class MarginalChoice:
    """The estimator of m, and why.

    Attributes:
        method: The method to run; ``none`` where no m is formed because there is nothing to form it from.
        rung: Rung of the ladder.
        reason: One sentence.
        estimable: Whether mu can be had: from m, or from g_t itself at the ``reference-point``. If not, no m is formed
            and only ``alpha_var`` may be printed (and, on the rung ``small drift``, an interval of alpha).
        drift: Largest norm of log pi_theta / pi_ref seen on the probed pairs, in nats; 0 at theta_ref.
    """

    method: MarginalMethod
    rung: Rung
    reason: str
    estimable: bool
    drift: float = 0.0


def choose_marginal(policy: Policy, examples: Sequence[Example], options: StreamOptions) -> MarginalChoice:
    """Climbs down the ladder until a rung bears.

    1. ``reference point``: DPO with a reward of the answer alone, at theta_ref, temperature 1, no top-p, no top-k, at
       most 2% of the responses cut: b_t = 0, mu = E g_t, no m is needed.
    2. ``posterior traces``: at least two traces of each answer whose weights exp(Delta) the drift has not collapsed.
    3. ``prior traces``: traces drawn regardless of the answer, where enough of them survive.
    4. ``small drift``: mu is not estimable, but g_t's bias is small.
    5. ``not estimable``.

    Args:
        policy: The policy at theta.
        examples: What `join` made of D_t, D_e and the trace bank.
        options: Objective, budget, and the method, which is checked and kept where it is not ``auto``.

    Raises:
        UserError: A method was asked for that this data or objective rules out; or a bank is needed, and the one that
            was given covers only some prompts. All of it before the first forward.
    """
    ladder = Ladder(policy, examples, options)
    if options.method == "none":
        return MarginalChoice("none", "asked for", "No marginal gradient was asked for.", False, ladder.drift)
    if options.method != "auto":
        return _asked_for(ladder, options.method)
    reasons: list[str] = []
    for method, rung in ladder.rungs():
        if method == "reference-point":
            if (obstacle := ladder.obstacle(method)) is None:
                reason = (
                    "theta = theta_ref and all pairs were sampled at temperature 1 without top-p or top-k, with "
                    "(nearly) nothing cut, so b_t = 0 exactly and mu = E g_t: no marginal gradient is needed."
                )
                return MarginalChoice(method, rung, reason, True)
            reasons.append(obstacle)
            if not ladder.check_coverage():
                say(f"There is no trace bank, and {obstacle}: mu may not be estimable. `bvpo-stats traces` makes one.")
            continue
        bears, reason = ladder.verdict(method)
        reasons.append(reason)
        if bears:
            return MarginalChoice(method, rung, _sentence(reasons), True, ladder.drift)
    small = ladder.plain and options.objective.name == "dpo" and ladder.drift <= SMALL_DRIFT
    reasons.append(
        f"the largest log-ratio to the reference is {ladder.drift:.2g} nats"
        + (", so g_t's bias is small and an interval of alpha can be given" if small else "")
        + "; mu is not estimable: make a bank with more traces, or pairs whose answers are the final answers alone"
    )
    return MarginalChoice("none", "small drift" if small else "not estimable", _sentence(reasons), False, ladder.drift)


def reference_of(policy: Policy, options: StreamOptions) -> Reference:
    """The policy's reference at the present theta, as the options ask for it."""
    stored = options.reference == "record"
    return Reference(policy, policy.at_reference, stored, options.max_tokens, options.max_padding)


class Ladder:
    """What the ladder looks at: theta, the law of the records, and the weights of a few prompts' traces."""

    def __init__(self, policy: Policy, examples: Sequence[Example], options: StreamOptions) -> None:
        self.examples = examples
        self.options = options
        self.at_reference = policy.at_reference
        self.plain = all(example.sampled_plainly for example in examples)
        self._reference = reference_of(policy, options)
        step = max(1, len(examples) // PROBED_PROMPTS)
        self._probed = examples[::step][:PROBED_PROMPTS]

    def check_coverage(self) -> bool:
        """Whether there is a bank; refuses one that has traces for some answers only, as every answer needs its own.

        Raises:
            UserError: Names a prompt that lacks them.
        """
        bare = [
            example
            for example in self.examples
            if not all(bank.same_answer or bank.chain or bank.prior for _, bank in example.sides)
        ]
        if len(bare) < len(self.examples) and bare:
            raise UserError(
                f"mu needs the trace bank, which covers {len(self.examples) - len(bare)} of {len(self.examples)} pairs "
                f"of D_t (not that of prompt {bare[0].prompt_id}). Make the bank from all pairs (`bvpo-stats traces`), "
                "or leave those without traces out of the pairs; without any bank, alpha* is not estimated."
            )
        return not bare

    def rungs(self, *, off_reference: bool = False) -> list[tuple[MarginalMethod, Rung]]:
        """Methods from the best to the last resort.

        Args:
            off_reference: Those for a theta that has left theta_ref, wherever it is now.
        """
        rungs: list[tuple[MarginalMethod, Rung]] = [("posterior", "posterior traces"), ("prior", "prior traces")]
        if off_reference:
            return rungs
        if self.at_reference and self.options.objective.needs_reference and not self.has_further_posterior_traces:
            rungs.insert(0, ("anchored", "posterior traces"))
        return [("reference-point", "reference point"), *rungs]

    def by_records(self, *, off_reference: bool = False) -> tuple[MarginalMethod, list[str]]:
        """The first method that the records allow, and what rules out those before it.

        What the weights say is left to whoever runs the method (`MarginalDiagnostics.failure`).

        Args:
            off_reference: As in :meth:`rungs`.

        Returns:
            ``none`` where all are ruled out.
        """
        reasons: list[str] = []
        for method, _ in self.rungs(off_reference=off_reference):
            obstacle = self.obstacle(method) or self._too_few(method, off_reference=off_reference)
            if obstacle is None:
                return method, reasons
            reasons.append(obstacle)
        return "none", reasons

    def _too_few(self, method: MarginalMethod, *, off_reference: bool = False) -> str | None:
        """One posterior trace of an answer is enough where log-ratios are 0, nowhere else."""
        exact = self.at_reference and not off_reference and self.plain and self.options.objective.needs_reference
        if method != "posterior" or exact:
            return None
        counts = [len(select_traces(bank, method, self.options.traces_per_answer)) for bank in self._banks()]
        return "the bank has fewer than two posterior traces for some answers" if min(counts) < 2 else None

    @functools.cached_property
    def drift(self) -> float:
        """Largest norm of log pi_theta / pi_ref on the probed pairs."""
        if self.at_reference:
            return 0.0
        planner = Planner(RowRules(self.options.objective, "none", self.at_reference, second_traces=False))
        plans = [planner.add(example) for example in self._probed]
        logps = log_probs(self._reference, planner.sequences())
        rows = [row for plan in plans for row in plan.trace]
        return float(np.abs(logps.policy - logps.reference)[rows].max())

    @property
    def has_further_posterior_traces(self) -> bool:
        """Whether every answer has posterior traces besides the pair's own."""
        return all(bank.same_answer or bank.chain for bank in self._banks())

    def obstacle(self, method: MarginalMethod) -> str | None:
        """What rules a method out before any weight is looked at; None where nothing does."""
        name = self.options.objective.name
        nucleus = [e for e in self.examples if (e.both[0].top_p or 1) < 1 or e.both[0].top_k]
        if method == "reference-point":
            if name != "dpo":
                return f"the weights of {name} depend on each trace's length, so E g_t is not mu even at theta_ref"
            if not self.at_reference:
                return "the policy is off theta_ref"
            return next((reason for e in self.examples if (reason := e.not_plain) is not None), None)
        if any(None in (e.both[0].chosen_answer_start, e.both[0].rejected_answer_start) for e in self.examples):
            return "where the answers of D_t begin is not recorded"
        if method == "anchored" and not self.plain:
            reason = next(reason for e in self.examples if (reason := e.not_plain) is not None)
            return (
                f"anchors are posterior draws only at temperature 1, without top-p or top-k and nothing cut ({reason})"
            )
        if method == "posterior" and name == "simpo":
            return "simpo needs log pi(y | x) itself, which posterior traces do not give (their normaliser is unknown)"
        if method == "posterior" and nucleus:
            return "the pairs were sampled with top-p below 1 or top-k, so the law of their own traces is not known"
        try:
            counts = [len(select_traces(bank, method, self.options.traces_per_answer)) for bank in self._banks()]
        except UserError as error:
            return str(error).partition(";")[0]
        needed = {"jackknife": 2, "multilevel": 2}.get(method, 1)
        if min(counts) >= needed:
            return None
        lawless = (e.not_plain for e in self.examples if any(bank.own.temperature is None for _, bank in e.sides))
        unknown = next((f", not counting the pairs' own: {reason}" for reason in lawless if reason), "")
        return f"some answers have fewer than {needed} traces{unknown}"

    def verdict(self, method: MarginalMethod) -> tuple[bool, str]:
        """Whether a method bears, by its weights on the probed prompts, and why (without a full stop)."""
        if (obstacle := self.obstacle(method)) is not None:
            return False, obstacle
        if (obstacle := self._too_few(method)) is not None:
            return False, obstacle
        found = self.diagnostics(method)
        summary = f"{method} traces: effective size {found.effective_size:.3g} of {found.traces:.3g}"
        if found.failure is not None:
            return False, f"{summary}, but {found.failure}"
        if found.anchor_gap is not None:
            summary += f", anchor gap {found.anchor_gap:.2g} against log K = {found.log_traces:.2g}"
        return True, summary

    def diagnostics(self, method: MarginalMethod) -> MarginalDiagnostics:
        """Diagnostics of a method's weights on the probed prompts."""
        rules = RowRules(
            self.options.objective,
            method,
            self.at_reference,
            self.options.traces_per_answer,
            second_traces=False,
            seed=self.options.seed,
        )
        found = []
        for example in self._probed:
            planner = Planner(rules)
            plan = planner.add(example)
            sequences = planner.sequences()
            found += sparse_rows([plan], log_probs(self._reference, sequences), sequences, rules)[1][0]
        return aggregate(found)

    def _banks(self) -> list[SideBank]:
        return [bank for example in self.examples for _, bank in example.sides]


def check_method(policy: Policy, examples: Sequence[Example], options: StreamOptions) -> None:
    """Refuses a method that the data or the objective rules out, whatever the weights are.

    Raises:
        UserError: Says why.
    """
    _check(Ladder(policy, examples, options), options.method)


def _check(ladder: Ladder, method: MarginalMethod) -> None:
    if method not in ("auto", "none") and (obstacle := ladder.obstacle(method)) is not None:
        raise UserError(f"`method={method!r}` is ruled out: {obstacle}. Use `method='auto'`.")


def _asked_for(ladder: Ladder, method: MarginalMethod) -> MarginalChoice:
    _check(ladder, method)
    if method == "reference-point":
        return MarginalChoice(method, "asked for", "mu = E g_t was asked for, and holds exactly here.", True)
    found = ladder.diagnostics(method)
    reason = f"{method} was asked for; effective size {found.effective_size:.3g} of {found.traces:.3g} traces"
    if found.failure is not None:
        reason += f"; {found.failure}, so mu is not estimable"
        return MarginalChoice(method, "not estimable", f"{reason}.", False, ladder.drift)
    if method == "anchored" and not ladder.at_reference:
        reason += "; off theta_ref the anchor is a draw of pi_ref's posterior, so a bias of order drift / K remains"
    return MarginalChoice(method, "asked for", f"{reason}.", True, ladder.drift)


def _sentence(reasons: Sequence[str]) -> str:
    text = "; ".join(reason for reason in reasons if reason)
    return f"{text[:1].upper()}{text[1:]}." if text else ""
