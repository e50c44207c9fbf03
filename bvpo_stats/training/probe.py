"""The probe set: prompts held out of training, on which mu, the gradient of the marginal loss, is estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bvpo_stats.distributed import World
from bvpo_stats.gradients.examples import Example, check_identity
from bvpo_stats.gradients.ladder import Ladder
from bvpo_stats.gradients.marginal import SideDiagnostics, aggregate, select_traces
from bvpo_stats.gradients.options import MarginalMethod, StreamOptions
from bvpo_stats.gradients.reference import check_stored_log_probs
from bvpo_stats.gradients.stream import gradient_batches
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.subset import Subset
from bvpo_stats.statistics.moments import Moments


@dataclass(frozen=True)
class ProbeResult:
    """What a look at the probe set gave.

    Attributes:
        method: Estimator of mu; ``none`` where there was none to use.
        reason: One sentence.
        moments: Moments of the gradients; None where mu could not be estimated (and in all processes but the first).
    """

    method: MarginalMethod
    reason: str
    moments: Moments | None


class ProbeSet:
    """The probe prompts with their traces, and how their gradients are taken."""

    def __init__(
        self,
        policy: Policy,
        subset: Subset,
        examples: Sequence[Example],
        options: StreamOptions,
    ) -> None:
        """Checks the records once; later looks take them as they are.

        Args:
            policy: The policy, at any theta.
            subset: The weights that are trained.
            examples: The probe prompts' examples, with their traces.
            options: Objective, traces per answer, budget, seed; the method is chosen anew at each look.

        Raises:
            UserError: Records of another model or template, or whose stored log-probabilities are not the reference's.
        """
        self._policy, self._subset = policy, subset
        self._examples = examples
        if not options.allow_mismatch:
            check_identity(policy, self._examples)
        check_stored_log_probs(policy, self._examples, options.checked_records)
        self._options = replace(options, checked_records=0, allow_mismatch=True)

    @property
    def prompts(self) -> int:
        """Number of probe prompts."""
        return len({example.prompt_id for example in self._examples})

    @property
    def has_traces(self) -> bool:
        """Whether there is a trace bank."""
        return any(example.traces for example in self._examples)

    def tokens(self) -> int:
        """Tokens of one look: all pairs and the traces that are used (off the reference point)."""
        method, _ = self._method(off_reference=True)
        total = sum(
            2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for e in self._examples for p in e.pairs
        )
        if method == "none":
            return total
        for example in self._examples:
            for _, bank in example.sides:
                used = select_traces(bank, method, self._options.traces_per_answer)
                total += sum(len(t.prompt_ids) + len(t.completion_ids) for t in used if t is not bank.own)
        return total

    def look(self, world: World | None = None) -> ProbeResult:
        """Gradients of the probe prompts at the present theta, as moments; processes share the prompts."""
        world = world or World()
        method, reason = self._method()
        if method == "none":
            return ProbeResult(method, reason, None)
        prompts = list(dict.fromkeys(example.prompt_id for example in self._examples))
        mine = set(prompts[world.rank :: world.size])
        moments: Moments | None = None
        diagnostics: list[SideDiagnostics] = []
        if mine:
            examples = [example for example in self._examples if example.prompt_id in mine]
            options = replace(self._options, method=method)
            for batch in gradient_batches(self._policy, self._subset, examples, options):
                moments = moments or Moments.init(tuple(batch.vectors), tuple(batch.vectors["t"]))
                moments = moments.update(batch.vectors, batch.prompt_ids, trace2=batch.trace2)
                diagnostics += batch.diagnostics
        parts = world.gather((None if moments is None else moments.to_arrays(), diagnostics))
        return _together(method, reason, parts)

    def _method(self, off_reference: bool = False) -> tuple[MarginalMethod, str]:
        """The first rung of the ladder that the records allow; what their weights say is seen after the pass."""
        ladder = Ladder(self._policy, self._examples, self._options)
        method, reasons = ladder.by_records(off_reference=off_reference)
        return method, f"mu is not estimable here: {'; '.join(reasons)}" if method == "none" else _WORDS[method]


_WORDS: dict[str, str] = {
    "reference-point": "mu = E g_t exactly, at the reference point and temperature 1",
    "anchored": "mu from each pair's own trace and draws regardless of the answer",
    "posterior": "mu from posterior traces of each answer",
    "prior": "mu from traces drawn regardless of the answer",
}


def _together(method: MarginalMethod, reason: str, parts: Sequence[Any]) -> ProbeResult:
    moments: Moments | None = None
    for arrays, _ in parts:
        if arrays is not None:
            found = Moments.from_arrays(arrays)
            moments = found if moments is None else moments.merge(found)
    diagnostics = [side for _, found in parts for side in found]
    failure = aggregate(diagnostics).failure if diagnostics else None
    if failure is not None:
        return ProbeResult(method, f"{reason}, but {failure}: mu is not estimable", None)
    return ProbeResult(method, reason, moments)
