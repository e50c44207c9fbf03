"""The oracle training study: does an estimated alpha train better than any fixed one? Exact answers, seed by seed.

SGD on L_c over the enumerable model, many seeds at once, with alpha fixed, exact or estimated. The training loop sees
sampled pairs only. Beside it, everything Theorem 3 speaks of is summed exactly at every step: the gradient of L_m, the
bias and the variance of g_c, and now and then the spectral norm of L_m's Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle.build import build_oracle
from bvpo_stats.lab.oracle.draws import draw_examples
from bvpo_stats.lab.oracle.ensemble import (
    Copies,
    CopyMoments,
    Curvatures,
    Ensemble,
    Pairs,
    Probe,
    copy_moments,
    curvature_root,
    draw_probe,
    in_metric,
    marginal_vectors,
    noise_curvature,
    pair_vectors,
)
from bvpo_stats.lab.oracle_training.config import OracleTrainingConfig
from bvpo_stats.lab.oracle_training.report import OracleTrainingReport, summary
from bvpo_stats.progress import progress
from bvpo_stats.statistics.moments import Array, Moments
from bvpo_stats.store.jsonl import RowLog
from bvpo_stats.store.run_folder import open_run
from bvpo_stats.training.alpha import AdaptiveController, AdaptiveOptions, Controller, Observation, StepSums
from bvpo_stats.training.alpha.adaptive import Criterion, ratio_parts

RUNS_FILE = "trajectories.jsonl"
Curvature = Literal["noise", "norm", "one"]
"""L in eta L: the mean curvature along the gradient noise, ``tr(H Sigma) / tr Sigma`` with Sigma = Cov(g_t - g_e); the
spectral norm of the Hessian; or none, ``eta L = 1`` whatever the step."""

_POWER_STEPS, _POWER_STEPS_AT_START = 30, 8
_LOOK_EVERY = 25
"""Steps from one look at the spectral norm to the next."""
_TRAIN, _PROBE = 1, 2


@dataclass(frozen=True)
class Setting:
    """The model, its data and the length of a run.

    Attributes:
        config: Of the study.
        ensemble: The oracle.
        objective: DPO.
    """

    config: OracleTrainingConfig
    ensemble: Ensemble
    objective: Objective

    @classmethod
    def of(cls, config: OracleTrainingConfig) -> Setting:
        """Builds the oracle."""
        return cls(config, Ensemble.of(build_oracle(config.oracle)), Objective(beta=config.beta))

    def exact(self, copies: Copies) -> CopyMoments:
        """Exact moments."""
        return copy_moments(self.ensemble.oracle, copies, self.objective)

    def smoothness(self) -> float:
        """Spectral norm of L_m's Hessian at theta_ref."""
        theta = self.ensemble.oracle.theta[None]
        return float(self.refined(Curvatures.start(*theta.shape), theta, _POWER_STEPS).norm[0])

    def refined(self, curvatures: Curvatures, thetas: Array, steps: int) -> Curvatures:
        """Power iteration on the Hessian of L_m."""
        return curvatures.refine(self.ensemble, thetas, lambda copies: self.exact(copies).mu, steps)


@dataclass(frozen=True)
class Method:
    """Where alpha comes from.

    Attributes:
        name: In the tables.
        source: ``fixed``; ``exact`` moments at every step; or ``estimated`` by the adaptive controller from samples.
        alpha: The fixed alpha, or the prior.
        criterion: What alpha minimises, see `bvpo_stats.training.alpha.adaptive`.
        curvature: Which L.
        eta_l_factor: Multiplies eta L; anything but 1 is an injected error.
        options: Of the controller.
    """

    name: str
    source: Literal["fixed", "exact", "estimated"]
    alpha: float = 0.5
    criterion: Criterion = "descent"
    curvature: Curvature = "noise"
    eta_l_factor: float = 1.0
    options: AdaptiveOptions = field(default_factory=AdaptiveOptions)


FIXED = tuple(Method(f"alpha = {a:g}", "fixed", alpha=a) for a in (0.0, 0.25, 0.5, 0.75, 1.0))
ADAPTIVE = Method("adaptive", "estimated")
METHODS = (
    *FIXED,
    ADAPTIVE,
    Method("adaptive, error", "estimated", criterion="error"),
    Method("adaptive, error, L = spectral norm", "estimated", criterion="error", curvature="norm"),
    Method("adaptive, error, eta L = 1", "estimated", criterion="error", curvature="one"),
    Method("exact", "exact"),
    Method("exact, error", "exact", criterion="error"),
    Method("exact, error, L = spectral norm", "exact", criterion="error", curvature="norm"),
)
"""Five fixed weights; alpha estimated and exact, by either criterion; and with the worst-case L, or none at all.

The trainer's choices are ``error``: with the noise curvature for ``eta_l="auto"`` (measured once, at its start), with
``eta L = 1`` by default.
"""


@dataclass(frozen=True)
class View:
    """What there is to see at one step.

    Attributes:
        thetas: Parameters of each copy.
        copies: Scores there.
        moments: Exact moments there.
        norm: Spectral norm of L_m's Hessian, as of the last look.
        eta: Learning rate.
    """

    thetas: Float[np.ndarray, "copies parameters"]
    copies: Copies
    moments: CopyMoments
    norm: Float[np.ndarray, " copies"]
    eta: float

    def part(self, rows: slice) -> View:
        """Some of the copies."""
        copies = Copies(self.copies.joint[rows], self.copies.scores[rows])
        moments = self.moments
        parts = replace(moments.parts, **{k: v[rows] for k, v in vars(moments.parts).items() if v is not None})
        some = (moments.mean_t[rows], moments.mean_e[rows], moments.mu[rows], moments.loss_m[rows])
        return View(self.thetas[rows], copies, CopyMoments(*some, parts), self.norm[rows], self.eta)


class _Fixed:
    """The same alpha at every step; base of the other two sources."""

    def __init__(self, setting: Setting, method: Method, seeds: Sequence[int]) -> None:
        self._setting, self._method, self._seeds = setting, method, seeds

    @property
    def held(self) -> Array:
        """1 for each copy whose alpha is held for want of data, else 0."""
        return np.zeros(len(self._seeds))

    def alphas(self, view: View) -> Float[np.ndarray, " copies"]:
        """Alpha of each copy before a step."""
        return np.full(len(view.thetas), self._method.alpha)

    def learn(self, step: int, view: View, t: Array, e: Array) -> None:
        """What is learnt from a step: nothing, where alpha is fixed or all is known."""


class _Exact(_Fixed):
    """alpha from exact moments."""

    def alphas(self, view: View) -> Array:
        parts, method = view.moments.parts, self._method

        def exact_curvature() -> Array:
            return view.norm if method.curvature == "norm" else exact_noise_curvature(self._setting, view)

        eta_l = method.eta_l_factor * _eta_l(method.curvature, view, exact_curvature)
        found = []
        for k, rho in enumerate(eta_l):
            numerator, denominator, _ = ratio_parts(
                parts.select(k), self._setting.config.batch_size, float(rho), method.criterion
            )
            found.append(np.clip(numerator / denominator, 0.0, 1.0))
        return np.array(found)


class _Estimated(_Fixed):
    """The adaptive controller on sampled data, one a copy."""

    def __init__(self, setting: Setting, method: Method, seeds: Sequence[int]) -> None:
        super().__init__(setting, method, seeds)
        options = replace(method.options, criterion=method.criterion)
        self._controllers: list[Controller] = [AdaptiveController.start(options) for _ in seeds]
        oracle = setting.ensemble.oracle
        entropy = [[seed, _PROBE] for seed in seeds]
        self._probe: Probe = draw_probe(oracle, setting.config.probe_prompts, setting.config.traces, entropy)
        self._ids = [f"probe-{k}" for k in range(setting.config.probe_prompts)]
        self._noise = np.zeros((2, len(seeds)))
        self._norm: Curvatures | None = None

    @property
    def held(self) -> Array:
        return np.array([float(controller.record.held) for controller in self._controllers])

    def alphas(self, view: View) -> Array:
        return np.array([controller.alpha for controller in self._controllers])

    def learn(self, step: int, view: View, t: Array, e: Array) -> None:
        probes: list[Moments | None] = [None] * len(t)
        if step % self._setting.config.probe_every == 0:
            probes = list(self._probes(view))
            self._measure(view, t - e)
        eta_l = self._method.eta_l_factor * _eta_l(self._method.curvature, view, self._measured)
        for k, controller in enumerate(self._controllers):
            sums = StepSums.of_units(t[k], e[k])
            seen = Observation(step, self._setting.config.batch_size, float(eta_l[k]), sums, probes[k])
            self._controllers[k] = controller.update(seen)

    def _probes(self, view: View) -> Sequence[Moments]:
        oracle, objective = self._setting.ensemble.oracle, self._setting.objective
        t, e = pair_vectors(oracle, view.copies, self._probe.pairs, objective)
        m = marginal_vectors(oracle, view.copies, self._probe, objective)
        parts = zip(t, e, m, strict=True)
        return [Moments.init().update(dict(zip("tem", one, strict=True)), self._ids) for one in parts]

    def _measure(self, view: View, difference: Array) -> None:
        """L from samples: along the noise of the batch, or the spectral norm for the probe's D_t loss."""
        oracle, objective = self._setting.ensemble.oracle, self._setting.objective
        if self._method.curvature == "noise":
            noise = difference - difference.mean(axis=1, keepdims=True)
            found = noise_curvature(oracle, view.copies, self._probe, objective, noise)
            self._noise = self._method.options.decay * self._noise + np.stack(found)
        elif self._method.curvature == "norm":
            steps = 1 if self._norm else _POWER_STEPS_AT_START
            before = self._norm or Curvatures.start(*view.thetas.shape)
            self._norm = before.refine(
                self._setting.ensemble,
                view.thetas,
                lambda copies: pair_vectors(oracle, copies, self._probe.pairs, objective)[0].mean(axis=1),
                steps,
            )

    def _measured(self) -> Array:
        if self._norm is not None:
            return self._norm.norm
        return np.maximum(self._noise[0], 0.0) / self._noise[1]


def _eta_l(curvature: Curvature, view: View, measured: Callable[[], Array]) -> Array:
    return np.ones(len(view.norm)) if curvature == "one" else view.eta * measured()


def exact_noise_curvature(setting: Setting, view: View) -> Float[np.ndarray, " copies"]:
    """``tr(H Sigma) / tr Sigma`` of ``g_t - g_e``, H the Gauss-Newton Hessian of L_m."""
    oracle, objective = setting.ensemble.oracle, setting.objective
    curved = in_metric(view.copies, curvature_root(oracle, view.copies, objective))
    return np.asarray(copy_moments(oracle, curved, objective).parts.Q1 / view.moments.parts.Q1)


_SOURCES: dict[str, type[_Fixed]] = {"fixed": _Fixed, "exact": _Exact, "estimated": _Estimated}


def train(setting: Setting, methods: Sequence[Method], eta: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Trains one copy for each method and seed, all of them in one batch.

    A seed fixes a copy's data whatever the method and the step size, so runs pair up.

    Args:
        setting: Model and lengths.
        methods: Where alpha comes from.
        eta: Learning rate.
        seeds: Seeds of each method.

    Returns:
        For each method, then each seed: exact means over the trajectory (``grad_sq``, ``bias_sq``, ``variance`` of a
        batch, ``alpha``), ``loss_start`` and ``loss_end`` (L_m), ``smoothness`` (largest spectral norm seen),
        ``noise_curvature`` (mean), ``held`` (share of steps) and the curves ``grad_sq_curve`` and ``alpha_curve``.
    """
    ensemble, B, copies = setting.ensemble, setting.config.batch_size, len(methods) * len(seeds)
    oracle, choosers = ensemble.oracle, [_SOURCES[method.source](setting, method, seeds) for method in methods]
    shares = [slice(k * len(seeds), (k + 1) * len(seeds)) for k in range(len(methods))]  # of the copies, by method
    draws = [draw_examples(oracle, B * setting.config.steps, np.random.default_rng([seed, _TRAIN])) for seed in seeds]
    data = Pairs.of(draws * len(methods))
    thetas = np.tile(oracle.theta, (copies, 1))
    smoothness = Curvatures.start(*thetas.shape)
    log: dict[str, list[Array]] = {name: [] for name in ("grad_sq", "bias_sq", "variance", "alpha", "loss", "held")}
    norms, curvatures = [], []
    for step in range(setting.config.steps):
        look = step % _LOOK_EVERY == 0
        if look:
            refinements = 1 if step else _POWER_STEPS_AT_START
            smoothness = setting.refined(smoothness, thetas, refinements)
        scored = ensemble.at(thetas)
        view = View(thetas, scored, setting.exact(scored), smoothness.norm, eta)
        if look:
            norms.append(view.norm)
            curvatures.append(exact_noise_curvature(setting, view))
        views = [view.part(share) for share in shares]
        alpha = np.concatenate([one.alphas(part) for one, part in zip(choosers, views, strict=True)])
        parts = view.moments.parts
        values = (parts.marginal_sq, parts.bias_sq(alpha), parts.variance(alpha) / B, alpha, view.moments.loss_m)
        for name, value in zip(log, (*values, np.concatenate([one.held for one in choosers])), strict=True):
            log[name].append(value)
        t, e = pair_vectors(oracle, scored, data.part(step * B, step * B + B), setting.objective)
        mix = alpha[:, None] * t.mean(axis=1) + (1 - alpha[:, None]) * e.mean(axis=1)
        for one, part, share in zip(choosers, views, shares, strict=True):
            one.learn(step, part, t[share], e[share])
        thetas = thetas - eta * mix
    end = setting.exact(ensemble.at(thetas)).loss_m
    curves = {name: np.stack(values, axis=1) for name, values in log.items()}
    return [_row(k, curves, float(end[k]), np.stack(norms), np.stack(curvatures)) for k in range(copies)]


def _row(k: int, curves: dict[str, Array], end: float, norms: Array, curvatures: Array) -> dict[str, Any]:
    means = {name: float(curves[name][k].mean()) for name in ("grad_sq", "bias_sq", "variance", "alpha", "held")}
    return {
        **means,
        "loss_start": float(curves["loss"][k, 0]),
        "loss_end": end,
        "smoothness": float(norms[:, k].max()),
        "smoothness_mean": float(norms[:, k].mean()),
        "noise_curvature": float(curvatures[:, k].mean()),
        "grad_sq_curve": curves["grad_sq"][k].tolist(),
        "alpha_curve": curves["alpha"][k].tolist(),
    }


def run_oracle_training(
    config: OracleTrainingConfig, output: Path, methods: Sequence[Method] = METHODS
) -> OracleTrainingReport:
    """Runs (or resumes) the study in a folder and writes its report and figures.

    Raises:
        UserError: Settings out of range, or the folder belongs to another run.
    """
    identity = {**config.to_dict(), "methods": [asdict(method) for method in methods]}
    identity.pop("level")  # changes no trajectory
    with open_run(output, OracleTrainingReport.study, identity) as folder:
        report = _train_all(config, folder, methods)
        report.write(folder)
    return report


def _train_all(config: OracleTrainingConfig, folder: Path, methods: Sequence[Method]) -> OracleTrainingReport:
    setting = Setting.of(config)
    reference = setting.smoothness()
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
    facts = {"smoothness_at_reference": reference, "parameters": len(setting.ensemble.oracle.theta)}
    results = summary(rows, config.level, config.steps)
    return OracleTrainingReport(config.to_dict() | facts, [asdict(method) for method in methods], results)
