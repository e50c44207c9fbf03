"""Options of the gradient stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from bvpo_stats.errors import UserError, check_kind, check_whole
from bvpo_stats.gradients.objectives import Objective

MarginalMethod = Literal["auto", "reference-point", "anchored", "posterior", "prior", "multilevel", "jackknife", "none"]


@dataclass(frozen=True)
class StreamOptions:
    """How prompts become gradients.

    Attributes:
        objective: The loss.
        method: Estimator of the marginal gradient m; ``auto`` asks `choose_marginal`, ``none`` forms no m.
        traces_per_answer: K, most traces of the bank that are used per pair side; None for all.
        second_traces: Form ``trace2``, g_t on a second trace draw, where the bank has one for both sides.
        half_splits: Add the members ``m1`` and ``m2``, m from either half of the traces (see `statistics.half_split`).
        reference: Whether stored log-probabilities under pi_ref are used: ``record`` takes them where there are any and
            the disabled adapter elsewhere; ``adapter`` always runs the model.
        checked_records: Number of stored log-probabilities that are compared with the policy's reference at the start.
        allow_mismatch: Take pairs and traces of another model or template.
        seed: Decides the levels of ``multilevel``.
        max_tokens: Budget of padded tokens per forward.
        max_padding: Largest share of padding per forward. Where the sequences of a prompt differ more in length, they
            are run in parts, at the price of an extra forward if the weights depend on log-probabilities.
    """

    objective: Objective = field(default_factory=Objective)
    method: MarginalMethod = "auto"
    traces_per_answer: int | None = None
    second_traces: bool = True
    half_splits: bool = False
    reference: Literal["record", "adapter"] = "record"
    checked_records: int = 8
    allow_mismatch: bool = False
    seed: int = 0
    max_tokens: int = 16_384
    max_padding: float = 0.25

    def __post_init__(self) -> None:
        check_kind("objective", self.objective, Objective, "an Objective")
        check_whole("seed", self.seed, low=0)
        if not isinstance(self.method, str) or self.method not in get_args(MarginalMethod):
            raise UserError(f"`method={self.method!r}`: choose {', '.join(get_args(MarginalMethod))}.")
        if self.traces_per_answer is not None and self.traces_per_answer < 1:
            raise UserError(f"`traces_per_answer={self.traces_per_answer}`: at least 1.")
        if self.max_tokens < 1:
            raise UserError(f"the budget of tokens per forward is {self.max_tokens}; it must be positive.")
        if not 0 <= self.max_padding < 1:
            raise UserError(f"the largest share of padding is {self.max_padding}; it must lie in [0, 1).")
