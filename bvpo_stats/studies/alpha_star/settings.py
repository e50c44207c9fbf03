"""What alpha* is asked for, and of what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.estimates import noise_scale
from bvpo_stats.statistics.intervals import Method, t_quantile


@dataclass(frozen=True)
class AlphaSettings:
    """What alpha* is asked for.

    Attributes:
        batch_size: Examples per optimizer step, B.
        eta_l: Learning rate times smoothness.
        level: Confidence level.
        method: How intervals of weights are made.
    """

    batch_size: float = 128.0
    eta_l: float = 1.0
    level: float = 0.95
    method: Method = "fieller"

    def __post_init__(self) -> None:
        noise_scale(self.batch_size, self.eta_l)
        t_quantile(self.level, 20)
        if self.method not in get_args(Method):
            raise UserError(f"`interval={self.method!r}`: choose {', '.join(get_args(Method))}.")


@dataclass(frozen=True)
class AlphaContext:
    """What the report says of the run besides its numbers.

    Attributes:
        model: Identity of the policy.
        template: Its protocol.
        objective: Loss and its constants.
        subset: What the parameters are.
        n_parameters: How many there are.
        seed: Seed of the run.
        curvature: How eta L was measured, None where given.
        warnings: What the run noticed.
    """

    model: str
    template: str
    objective: dict[str, Any]
    subset: str
    n_parameters: int
    seed: int = 0
    curvature: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
