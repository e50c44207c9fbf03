"""The oracle training study: does an estimated alpha train better than any fixed one? Exact answers, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle.build import OracleConfig, build_oracle
from bvpo_stats.lab.oracle.ensemble import Curvatures, Ensemble
from bvpo_stats.lab.oracle_training.loop import METHODS, Method, Setting, train
from bvpo_stats.lab.oracle_training.report import summary
from bvpo_stats.progress import progress
from bvpo_stats.store.jsonl import write_atomic
from bvpo_stats.store.row_log import RowLog
from bvpo_stats.store.run_folder import open_run
from bvpo_stats.studies.base import software_versions, to_json

RUNS_FILE = "trajectories.jsonl"
_POWER_STEPS = 30


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


def run_oracle_training(
    config: OracleTrainingConfig, output: Path, methods: Sequence[Method] = METHODS
) -> dict[str, Any]:
    """Runs (or resumes) the study in a folder and writes its report and figures.

    Returns:
        ``report.json`` as a dictionary.

    Raises:
        UserError: Settings out of range, or the folder belongs to another run.
    """
    identity = {**asdict(config), "methods": [asdict(method) for method in methods]}
    identity.pop("level")  # changes no trajectory
    with open_run(output, "oracle-training", identity) as folder:
        report = _train_all(config, folder, methods)
        write_atomic(folder / "report.json", to_json(report))
        _draw(report, folder)
    return report


def _train_all(config: OracleTrainingConfig, folder: Path, methods: Sequence[Method]) -> dict[str, Any]:
    setting = _setting(config)
    reference = _smoothness(setting)
    log, seeds = RowLog(folder / RUNS_FILE), range(config.seed, config.seed + config.seeds)
    rows = []
    with progress("Training the oracle", len(config.eta_l) * len(methods) * config.seeds, "runs") as advance:
        for eta_l, source in product(config.eta_l, dict.fromkeys(method.source for method in methods)):
            some = [method for method in methods if method.source == source]
            keys = [{"eta_l": eta_l, "method": method.name, "seed": seed} for method in some for seed in seeds]
            eta = eta_l / reference

            def compute(some: Sequence[Method] = some, eta: float = eta) -> Sequence[dict[str, Any]]:
                return [{"eta": eta, **row} for row in train(setting, some, eta, seeds)]

            rows += log.rows(keys, compute)
            advance(len(keys))
    settings = asdict(config) | {"smoothness_at_reference": reference, "parameters": len(setting.ensemble.oracle.theta)}
    return {
        "study": "oracle-training",
        "settings": settings,
        "methods": [asdict(method) for method in methods],
        "results": summary(rows, config.level, config.steps),
        "versions": software_versions(),
    }


def _setting(config: OracleTrainingConfig) -> Setting:
    return Setting(
        ensemble=Ensemble.of(build_oracle(config.oracle)),
        objective=Objective(beta=config.beta),
        steps=config.steps,
        batch_size=config.batch_size,
        probe_prompts=config.probe_prompts,
        traces=config.traces,
        probe_every=config.probe_every,
    )


def _smoothness(setting: Setting) -> float:
    """Spectral norm of L_m's Hessian at theta_ref."""
    theta = setting.ensemble.oracle.theta[None]
    start = Curvatures.start(*theta.shape)
    return float(start.refine(setting.ensemble, theta, setting.exact_gradient, _POWER_STEPS).norm[0])


def _draw(report: dict[str, Any], folder: Path) -> None:
    from bvpo_stats.lab.oracle_training.figures import oracle_training_figures
    from bvpo_stats.lab.oracle_training.output import markdown

    figures = oracle_training_figures(report, folder / "figures")
    write_atomic(folder / "report.md", markdown(report, figures))
