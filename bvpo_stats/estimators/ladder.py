"""Which estimator of the marginal gradient the data can bear, and the reason in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bvpo_stats.data.records import PreferencePair, TraceRecord
from bvpo_stats.model.policy import Policy

if TYPE_CHECKING:
    from bvpo_stats.estimators.stream import StreamOptions

MarginalMethod = Literal["auto", "reference-point", "anchored", "posterior", "prior", "multilevel", "jackknife", "none"]
Rung = Literal["reference point", "posterior traces", "prior traces", "small drift", "not estimable", "asked for"]


@dataclass(frozen=True)
class MarginalChoice:
    """The estimator of m, and why.

    Attributes:
        method: The method to run; ``none`` where no m is formed because there is nothing to form it from.
        rung: Rung of the ladder.
        reason: One sentence.
        estimable: Whether mu can be had: from m, or from g_t itself at the ``reference-point``. If not, only
            ``alpha_var`` may be printed (and, on the rung ``small drift``, an interval of alpha).
        drift: Largest norm of log pi_theta / pi_ref seen on the pairs, in nats; 0 at theta_ref.
    """

    method: MarginalMethod
    rung: Rung
    reason: str
    estimable: bool
    drift: float = 0.0


def choose_marginal(
    policy: Policy,
    pairs: Sequence[PreferencePair],
    traces: Sequence[TraceRecord],
    options: StreamOptions,
) -> MarginalChoice:
    """Climbs down the ladder until a rung bears.

    Args:
        policy: The policy at theta.
        pairs: D_t and D_e records.
        traces: The trace bank.
        options: Objective, budget, and the method, which is checked and kept where it is not ``auto``.

    Raises:
        UserError: A method was asked for that this data or objective rules out.
    """
    raise NotImplementedError
