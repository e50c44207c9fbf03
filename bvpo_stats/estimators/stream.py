"""One pass over prompts: g_t, g_e and the marginal gradient m of each, in batches of a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from bvpo_stats.data.records import PreferencePair, TraceRecord
from bvpo_stats.estimators.ladder import MarginalMethod
from bvpo_stats.estimators.marginal import SideDiagnostics
from bvpo_stats.estimators.objectives import Objective
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.subset import Subset


@dataclass(frozen=True)
class StreamOptions:
    """How prompts become gradients.

    Attributes:
        objective: The loss.
        method: Estimator of the marginal gradient m; ``auto`` asks `choose_marginal`.
        traces_per_answer: Most traces of the bank that are used per pair side; None for all.
        second_traces: Form ``trace2``, g_t on a second trace draw, where the bank has one for both sides.
        half_splits: Add the members ``m1`` and ``m2``, m from either half of the traces (see `statistics.half_split`).
        reference: Where log pi_ref comes from off theta_ref: ``record`` (stored values where there are any, the
            disabled adapter elsewhere) or ``adapter`` (always the disabled adapter).
        checked_records: Number of stored log-probabilities that are compared with the policy's reference at the start.
        allow_mismatch: Take pairs and traces of another model or template.
        seed: Decides the levels of ``multilevel``.
        max_tokens: Budget of padded tokens per forward.
        max_padding: Largest share of padding that is worth saving the extra forward of a prompt in parts.
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


@dataclass(frozen=True)
class GradientBatch:
    """Gradients of some prompts, one row each.

    Attributes:
        prompt_ids: Prompt of each row.
        vectors: Member (``t``, ``e``; ``m`` unless the method needs none; ``m1``, ``m2`` on request) to parameter block
            (decoder layer) to gradients ``[rows, parameters of the block]``.
        trace2: Block to g_t on a second, independent trace draw, for all rows or (None) for none of them.
        diagnostics: Trace weights of both sides of each row; empty where the method uses no bank.
    """

    prompt_ids: list[str]
    vectors: dict[str, dict[str, Float[np.ndarray, "rows parameters"]]]
    trace2: dict[str, Float[np.ndarray, "rows parameters"]] | None
    diagnostics: list[SideDiagnostics]


def gradient_batches(
    policy: Policy,
    subset: Subset,
    pairs: Sequence[PreferencePair],
    options: StreamOptions,
    traces: Sequence[TraceRecord] = (),
    done: frozenset[str] = frozenset(),
) -> Iterator[GradientBatch]:
    """Streams the gradients of all prompts that have both a D_t and a D_e pair.

    Args:
        policy: The policy at theta, dropout off.
        subset: The parameters theta.
        pairs: D_t and D_e records together, told apart by their ``mode``.
        options: How.
        traces: The trace bank of the D_t pairs.
        done: Prompts to leave out because an earlier run has them.

    Yields:
        Batches; every prompt is in exactly one of them.
    """
    raise NotImplementedError
