"""Settings of the oracle training study."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from bvpo_stats import options as o
from bvpo_stats.errors import UserError

if TYPE_CHECKING:
    from bvpo_stats.lab.oracle import OracleConfig

_KEPT = ("beta", "eta_l", "seeds", "seed", "steps", "batch_size", "probe_prompts", "traces", "probe_every", "level")


def step_sizes(words: str) -> tuple[float, ...]:
    """Reads numbers separated by commas.

    >>> step_sizes("0.2,1.4")
    (0.2, 1.4)
    """
    try:
        return tuple(float(word) for word in words.split(","))
    except ValueError as error:
        raise UserError(f"`eta_l={words}`: give numbers separated by commas, such as 0.2,0.6,1.4.") from error


@dataclass(frozen=True)
class OracleTrainingConfig:
    """Settings of the study.

    Attributes:
        eta_l: Step sizes, as learning rate times the smoothness at theta_ref.
        seeds: Runs of each method at each step size.
        steps: SGD steps of a run.
        batch_size: Pairs a step.
        beta: DPO's beta.
        probe_prompts: Held-out pairs behind the estimated mu.
        traces: K.
        probe_every: Steps between probes.
        symbols: V, trace symbols of the enumerable model.
        max_trace: T, its longest trace.
        oracle_prompts: Its prompts.
        oracle_seed: Decides its weights and rewards.
        level: Of the intervals over seeds.
        seed: The first of the seeds.
    """

    eta_l: Annotated[
        tuple[float, ...],
        o.Option(
            "Step sizes: learning rate times the smoothness at the reference, separated by commas.",
            above=0,
            high=1e6,
            read=step_sizes,
            spelled="0.2,0.6,1.4",
        ),
    ] = (0.2, 0.6, 1.4)
    seeds: Annotated[
        int,
        o.Option(
            "Runs of each method at each step size.",
            low=2,
            high=10**4,
            hint="be 2 to 10,000: the intervals are over seeds",
        ),
    ] = 10
    steps: Annotated[int, o.Option("SGD steps of a run.", low=1, high=10**7)] = 150
    batch_size: Annotated[
        int,
        o.Option(
            "Pairs of D_t and of D_e in a step.",
            low=2,
            high=10**6,
            hint="be 2 to a million pairs: the variance of a step needs 2",
        ),
    ] = 8
    beta: Annotated[float, o.Option("DPO's inverse temperature.", above=0, high=1e3)] = 1.0
    probe_prompts: Annotated[int, o.Option("Held-out pairs behind the estimated mu.", low=2, high=10**6)] = 256
    traces: Annotated[
        int,
        o.Option("K, traces an answer for its score, and as many again.", name="traces_per_answer", low=1, high=10**4),
    ] = 8
    probe_every: Annotated[int, o.Option("Steps from one probe to the next.", low=1, high=10**7)] = 10
    symbols: Annotated[int, o.Option("Trace symbols of the model's language.", low=1, high=1_000)] = 2
    max_trace: Annotated[int, o.Option("Longest trace.", low=0, high=10**4)] = 2
    oracle_prompts: Annotated[int, o.Option("Prompts of the language.", low=1, high=10**4)] = 2
    oracle_seed: Annotated[int, o.Option("Decides the model's weights and rewards.", low=0, high=2**32 - 1)] = 3
    level: Annotated[
        float,
        o.Option(
            "Confidence level of the intervals over seeds.", above=0, below=1, hint="lie between 0 and 1, e.g. 0.95"
        ),
    ] = 0.95
    seed: o.Seed = 0

    def __post_init__(self) -> None:
        o.check_options(self)
        if not self.eta_l:
            raise UserError("`eta_l=()`: give positive numbers, such as 0.2,0.6,1.4.")
        try:
            _ = self.oracle.grammar
        except UserError as error:  # sizes that nobody can enumerate
            sizes = ("symbols", "max_trace", "oracle_prompts")
            raise UserError(f"{', '.join(f'`{name}={getattr(self, name)}`' for name in sizes)}: {error}") from error

    @property
    def oracle(self) -> OracleConfig:
        """The enumerable model."""
        from bvpo_stats.lab.oracle import OracleConfig

        return OracleConfig(
            n_symbols=self.symbols, max_trace=self.max_trace, n_prompts=self.oracle_prompts, seed=self.oracle_seed
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as they stand in ``run.json`` and ``report.json``."""
        return {"oracle": asdict(self.oracle)} | {name: getattr(self, name) for name in _KEPT}
