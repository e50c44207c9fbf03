"""Options of the oracle training study."""

from __future__ import annotations

from dataclasses import dataclass

from bvpo_stats.errors import UserError
from bvpo_stats.lab.oracle.build import OracleConfig


@dataclass(frozen=True)
class OracleTrainingConfig:
    """Settings of the study.

    Attributes:
        oracle: The enumerable model.
        beta: DPO's beta.
        eta_l: Step sizes, as learning rate times the smoothness at theta_ref.
        seeds: Runs of each method at each step size.
        seed: The first of them.
        steps: SGD steps of a run.
        batch_size: Pairs a step.
        probe_prompts: Held-out pairs behind the estimated mu.
        traces: K.
        probe_every: Steps between probes.
        level: Of the intervals over seeds.
    """

    oracle: OracleConfig
    beta: float = 1.0
    eta_l: tuple[float, ...] = (0.2, 0.6, 1.4)
    seeds: int = 10
    seed: int = 0
    steps: int = 150
    batch_size: int = 8
    probe_prompts: int = 256
    traces: int = 8
    probe_every: int = 10
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise UserError(f"`seeds={self.seeds}`: intervals over seeds need at least 2.")
        if self.batch_size < 2:
            raise UserError(f"`batch_size={self.batch_size}`: the variance of a step needs at least 2 pairs.")
        if not self.eta_l or min(self.eta_l) <= 0:
            raise UserError("`eta_l`: give positive numbers, such as 0.2,0.6,1.4.")
        if min(self.steps, self.traces, self.probe_every) < 1:
            raise UserError("`steps`, `traces_per_answer` and `probe_every` must be at least 1.")
