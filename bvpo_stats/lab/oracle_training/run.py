"""The oracle training study: which alpha trains best? Exact losses on enumerable models, with train's own rules.

Copies of a model train side by side: every method, step size and seed of a setting in one batch. The loop sees sampled
pairs only; `AlphaStream`, the controllers and the rules are those of `BVPOTrainer`. What is reported is summed over all
traces: L_m and norm(grad L_m)^2 at a quarter, half and the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.gradients.objectives import Objective, PairLogps
from bvpo_stats.lab.oracle import OracleConfig
from bvpo_stats.lab.oracle.build import Oracle, build_oracle
from bvpo_stats.lab.oracle.draws import draw_examples
from bvpo_stats.lab.oracle.ensemble import Copies, Ensemble, Pairs, copy_moments, curvature_root, in_metric
from bvpo_stats.lab.oracle.forest import Forest
from bvpo_stats.lab.oracle_training.config import (
    ADAM_STEPS,
    SGD_STEPS,
    WEIGHT_DECAY,
    DrawnModel,
    OracleTrainingConfig,
)
from bvpo_stats.lab.oracle_training.report import OracleTrainingReport
from bvpo_stats.progress import progress
from bvpo_stats.statistics.moments import Array
from bvpo_stats.store.jsonl import RowLog
from bvpo_stats.store.run_folder import open_run
from bvpo_stats.training.alpha import AdaptiveController, AdaptiveOptions, AlphaStream, StepMeans, StepSize
from bvpo_stats.training.alpha.rules import Seen, rule_named
from bvpo_stats.training.alpha.stream import UNSETTLED

RUNS_FILE = "trajectories.jsonl"
_TRAIN = 1
_WARM_UP = 0.1
_EXACT_EVERY = 15
_EXACT_EARLY = (UNSETTLED, 10)
"""Steps at which exact moments are taken; in between the last ones hold."""
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_COPIES_AT_ONCE = 120
_POWER_STEPS = 30


@dataclass(frozen=True)
class Method:
    """Where alpha comes from.

    Attributes:
        name: In the tables.
        source: ``fixed``; a straight ``line``; ``exact`` moments; or ``estimated`` from samples.
        rule: Name of the rule, for the last two.
        line: alpha at the start and at the end, for the first two.
        eta_l: ``auto`` for eta L in the optimizer's metric, or 1, the paper's.
    """

    name: str
    source: Literal["fixed", "line", "exact", "estimated"]
    rule: str = ""
    line: tuple[float, float] = (0.5, 0.5)
    eta_l: Literal["auto", "one"] = "auto"


FIXED = tuple(Method(f"alpha = {a:g}", "fixed", line=(a, a)) for a in (0.0, 0.25, 0.5, 0.75, 1.0))
METHODS = (
    *FIXED,
    *(Method(f"line {a:g} to 1", "line", line=(a, 1.0)) for a in (0.0, 0.25, 0.5)),
    *(Method(name, "estimated", name) for name in ("rising", "theorem4", "descent", "direction", "hypergradient")),
    Method("theorem4, eta L = 1", "estimated", "theorem4", eta_l="one"),
    *(Method(f"{name}, exact", "exact", name) for name in ("rising", "theorem4", "descent", "direction")),
)


class Setting:
    """A model of the study with its exact loss."""

    def __init__(self, model: DrawnModel) -> None:
        """Builds the oracle, and the pass over all of its traces in float32, as models are trained."""
        shape = OracleConfig(n_symbols=2, max_trace=2, n_answers=3, n_prompts=model.prompts, seed=model.oracle_seed)
        self.model, self.oracle = model, build_oracle(shape)
        self.objective = Objective(beta=model.beta)
        self.ensemble = Ensemble.of(self.oracle)
        self._law = torch.tensor(self.oracle.pair_law / model.prompts)
        self._reference = torch.tensor(self.oracle.table.reference.marginal)
        self.forest = Forest(self.oracle, torch.float64)
        self.smoothness = self._smoothness()
        self.forest = Forest(self.oracle, torch.float32)
        self._law, self._reference = self._law.float(), self._reference.float()

    def _smoothness(self) -> float:
        """Spectral norm of L_m's Hessian at theta_ref, by power iteration on central differences of the gradient."""
        direction = np.random.default_rng(0).normal(size=len(self.oracle.theta))
        norm, reach = 0.0, 1e-3
        for _ in range(_POWER_STEPS):
            direction /= np.linalg.norm(direction)
            both = self.oracle.theta + reach * np.array([[1.0], [-1.0]]) * direction
            ahead, behind = self.loss_and_gradient(torch.tensor(both))[1].numpy()
            direction = (ahead - behind) / (2 * reach)
            norm = float(np.linalg.norm(direction))
        return norm

    def loss_and_gradient(self, thetas: Float[Tensor, "copies parameters"]) -> tuple[Tensor, Tensor]:
        """L_m and grad L_m of each copy."""
        own = thetas.clone().requires_grad_()
        with torch.enable_grad():
            loss = self.marginal_loss(self.forest.joint(own))
            (gradient,) = torch.autograd.grad(loss.sum(), own)
        return loss.detach(), gradient

    def marginal_loss(self, joint: Tensor) -> Float[Tensor, " copies"]:
        """L_m of each copy."""
        ratio = torch.logsumexp(joint, dim=2) - self._reference
        margin = self.objective.beta * (ratio[..., :, None] - ratio[..., None, :])
        return (self._law * torch.nn.functional.softplus(-margin)).sum(dim=(1, 2, 3))

    def step_sizes(self, optimizer: str) -> tuple[float, ...]:
        """Peak learning rates."""
        return tuple(s / self.smoothness for s in SGD_STEPS) if optimizer == "sgd" else ADAM_STEPS[self.model.beta]


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: transformers' cosine schedule with warm-up."""
    warm = math.ceil(_WARM_UP * steps)
    if step < warm:
        return step / max(1, warm)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class _Batches:
    """The pairs of every copy, as places among the sequences."""

    def __init__(self, oracle: Oracle, pairs: Pairs) -> None:
        shape = oracle.table.reference.joint.shape
        reference = torch.tensor(oracle.table.reference.joint, dtype=torch.float32).flatten()
        self._places, self._reference = [], []
        for chosen, rejected in (pairs.thinking, pairs.nothinking):
            flat = [
                torch.tensor(np.ravel_multi_index((pairs.prompt, trace, answer), shape))
                for trace, answer in (chosen, rejected)
            ]
            self._places.append(flat)
            self._reference.append([reference[place] for place in flat])

    def logps(self, joint: Tensor, which: int, batch: slice, rows: slice) -> PairLogps[Tensor]:
        """Log-probabilities of a batch of D_t (0) or D_e (1)."""
        chosen, rejected = (joint.flatten(1).gather(1, place[rows, batch]) for place in self._places[which])
        ones = torch.ones_like(chosen)
        ref_chosen, ref_rejected = (ref[rows, batch] for ref in self._reference[which])
        return PairLogps(chosen, rejected, ones, ones, ref_chosen, ref_rejected)


class _Chooser:
    """alpha of the copies of one method before each step; fixed and straight-line ones need nothing else."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def alphas(self, progress_: float, copies: int) -> Array:
        """Alpha of each copy, ``[copies]``."""
        start, end = self.method.line
        return np.full(copies, start + (end - start) * progress_)


class _Estimated(_Chooser):
    """The trainer's stream, for all copies of the method at once."""

    def __init__(self, method: Method, peak: Array, batch_size: int) -> None:
        super().__init__(method)
        controller = AdaptiveController.start(AdaptiveOptions(rule=method.rule, level=None), peak.shape)
        self.stream = AlphaStream(controller, StepSize(peak=peak, auto=method.eta_l == "auto"), batch_size)

    def alphas(self, progress_: float, copies: int) -> Array:
        controller = self.stream.controller
        assert isinstance(controller, AdaptiveController)
        return controller.decision.alpha


class _Exact(_Chooser):
    """The same rules, fed with exact moments."""

    def __init__(self, method: Method, copies: int, batch_size: int) -> None:
        super().__init__(method)
        self._batch_size, self._statistics, self._looks = batch_size, np.zeros((copies, 8)), 0
        self.smoothness = np.ones(copies)
        self._alpha, self.rate = np.full(copies, 0.5), np.zeros(copies)

    def look(self, setting: Setting, thetas: Array, metric: Array | None) -> None:
        """Exact moments in the metric."""
        self._looks += 1
        copies = setting.ensemble.at(thetas.astype(np.float32))
        copies = Copies(copies.joint.astype(np.float64), copies.scores.astype(np.float64))
        root = np.ones_like(thetas) if metric is None else np.sqrt(metric)
        scaled = Copies(copies.joint, copies.scores * root[:, None, None, None])
        p = copy_moments(setting.oracle, scaled, setting.objective).parts
        hh, e_h = p.trace_sq - 2 * p.trace_dot_empty + p.empty_sq, p.trace_dot_empty - p.empty_sq
        c_e = p.trace_dot_empty - p.empty_dot_marginal
        c_t = p.trace_sq - p.trace_dot_marginal
        B = self._batch_size
        within = (hh + p.Q1 / B, e_h - p.P1 / B, p.empty_sq + p.var_empty / B)
        self._statistics = np.stack([*within, hh, e_h, p.empty_sq, c_t - c_e, c_e], axis=-1)
        # tr(P H P Sigma): scores mapped by W P, W'W = H.
        curved = in_metric(
            Copies(copies.joint, copies.scores * root[:, None, None, None] ** 2),
            curvature_root(setting.oracle, copies, setting.objective),
        )
        self.smoothness = np.asarray(copy_moments(setting.oracle, curved, setting.objective).parts.Q1 / p.Q1)

    def alphas(self, progress_: float, copies: int) -> Array:
        seen = Seen(
            statistics=self._statistics,
            covariance=np.zeros((copies, 8, 8)),
            widest=np.zeros((copies, 8, 8)),
            effective=1e9,
            products=10**9 if self._looks else 0,
            batch=float(self._batch_size),
            batch_size=float(self._batch_size),
            eta_l=self.rate * self.smoothness,
            progress=progress_,
            prior=0.5,
            alpha=self._alpha,
            latest=None,
        )
        self._alpha = rule_named(self.method.rule).decide(seen, 0.95).alpha
        return self._alpha


def train(
    setting: Setting, optimizer: str, steps: int, methods: Sequence[Method], seeds: Sequence[int], batch_size: int
) -> list[dict[str, Any]]:
    """Trains one copy for each method, step size and seed, all in one batch.

    Returns:
        In that order: ``eta`` (peak), ``losses`` and ``grad_sq`` (at a quarter, half and the end), ``loss_start``,
        ``alpha_curve`` (25 points), ``eta_l`` (mean over the second half of the run, where there is one).
    """
    oracle, etas = setting.oracle, setting.step_sizes(optimizer)
    part = len(etas) * len(seeds)
    peak = np.repeat(np.array(etas), len(seeds))  # of one method's copies
    draws = [draw_examples(oracle, batch_size * steps, np.random.default_rng([seed, _TRAIN])) for seed in seeds]
    batches = _Batches(oracle, Pairs.of(draws * (len(etas) * len(methods))))
    copies = len(methods) * part
    thetas = torch.tensor(np.tile(oracle.theta, (copies, 1)), dtype=torch.float32)
    choosers: list[_Chooser] = []
    for method in methods:
        if method.source == "estimated":
            choosers.append(_Estimated(method, peak, batch_size))
        else:
            choosers.append(_Exact(method, part, batch_size) if method.source == "exact" else _Chooser(method))
    shares = [slice(k * part, (k + 1) * part) for k in range(len(methods))]
    adam = optimizer != "sgd"
    decay = WEIGHT_DECAY if optimizer == "adamw-decay" else 0.0
    first, second = torch.zeros_like(thetas), torch.zeros_like(thetas)
    metric: Tensor | None = None
    lr_all = torch.tensor(np.tile(peak, len(methods)), dtype=torch.float32)[:, None]
    marks = {math.ceil(steps / 4): 0, math.ceil(steps / 2): 1, steps: 2}
    losses, grads, curve, eta_ls = np.zeros((copies, 3)), np.zeros((copies, 3)), [], []
    start = np.zeros(copies)
    for step in range(steps + 1):
        if step in marks or step == 0:
            loss, grad_sq = _exact_loss(setting, thetas)
            if step == 0:
                start = loss
            else:
                losses[:, marks[step]], grads[:, marks[step]] = loss, grad_sq
        if step == steps:
            break
        done, share = step / steps, rate(step, steps)
        t, e, after = _step_gradients(setting, batches, thetas, step, batch_size, choosers, shares)
        for one, rows in zip(choosers, shares, strict=True):
            if isinstance(one, _Exact):
                one.rate = share * peak
                if step in _EXACT_EARLY or (step and step % _EXACT_EVERY == 0):
                    one.look(setting, thetas[rows].numpy().astype(np.float64), _doubles(metric, rows))
        for one, curvature in after:
            one.stream.measured(curvature)
        alpha = np.concatenate([one.alphas(done, part) for one in choosers])
        curve.append(alpha)
        weight = torch.tensor(alpha, dtype=torch.float32)[:, None]
        gradient = weight * t + (1 - weight) * e
        if adam:
            first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
            second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient**2
            metric = 1 / ((second / (1 - _BETAS[1] ** (step + 1))).sqrt() + _EPSILON)
            thetas = thetas * (1 - share * lr_all * decay) - share * lr_all * metric * first / (
                1 - _BETAS[0] ** (step + 1)
            )
        else:
            thetas = thetas - share * lr_all * gradient
        ahead = rate(step + 1, steps) * peak
        for one, rows in zip(choosers, shares, strict=True):
            if isinstance(one, _Estimated):
                h, own = (x[rows].numpy().astype(np.float64) for x in (t - e, e))
                means = StepMeans(step, batch_size, h, own)
                one.stream.observe(means, _doubles(metric, rows), ahead, progress=(step + 1) / steps)
        if step >= steps // 2:  # when it was measured
            eta_ls.append([_eta_l(one, ahead) for one in choosers])
    curves = np.stack(curve, axis=1)
    points = np.unique(np.linspace(0, steps - 1, min(steps, 25)).round().astype(int))
    mean_eta_l = np.array(eta_ls).transpose(1, 2, 0).reshape(copies, -1).mean(axis=1)  # [methods, part, steps]
    return [
        {
            "eta": float(lr_all[k, 0]),
            "loss_start": float(start[k]),
            "losses": [float(x) for x in losses[k]],
            "grad_sq": [float(x) for x in grads[k]],
            "alpha_curve": [round(float(x), 4) for x in curves[k, points]],
            "eta_l": float(mean_eta_l[k]) if np.isfinite(mean_eta_l[k]) else None,
        }
        for k in range(copies)
    ]


def _doubles(metric: Tensor | None, rows: slice) -> Array | None:
    return None if metric is None else metric[rows].numpy().astype(np.float64)


def _eta_l(one: _Chooser, ahead: Array) -> Array:
    if isinstance(one, _Exact):
        return one.smoothness * ahead
    if isinstance(one, _Estimated):
        return np.broadcast_to(np.asarray(one.stream.step_size.at(ahead)), ahead.shape)
    return np.full(ahead.shape, np.nan)


def _exact_loss(setting: Setting, thetas: Tensor) -> tuple[Array, Array]:
    parts = [setting.loss_and_gradient(part) for part in thetas.split(_COPIES_AT_ONCE)]
    losses, gradients = (torch.cat(part).double() for part in zip(*parts, strict=True))
    return losses.numpy(), gradients.square().sum(dim=1).numpy()


def _step_gradients(
    setting: Setting,
    batches: _Batches,
    thetas: Tensor,
    step: int,
    batch_size: int,
    choosers: Sequence[_Chooser],
    shares: Sequence[slice],
) -> tuple[Tensor, Tensor, list[tuple[_Estimated, Array]]]:
    """t_k and e_k of every copy, and the curvature along the noise for streams that ask for it."""
    batch = slice(step * batch_size, (step + 1) * batch_size)
    found: list[list[Tensor]] = [[], []]
    joints = []
    for start in range(0, len(thetas), _COPIES_AT_ONCE):
        rows = slice(start, min(start + _COPIES_AT_ONCE, len(thetas)))
        own = thetas[rows].clone().requires_grad_()
        with torch.enable_grad():
            joint = setting.forest.joint(own)
            for which, gradients in enumerate(found):
                loss = setting.objective(batches.logps(joint, which, batch, rows)).loss.mean(dim=1)
                gradients.append(torch.autograd.grad(loss.sum(), own, retain_graph=which == 0)[0])
        joints.append(joint.detach())
    joint, measured = torch.cat(joints), []
    for one, rows in zip(choosers, shares, strict=True):
        if isinstance(one, _Estimated) and one.stream.direction is not None:
            reach = np.asarray(one.stream.reach)[:, None]
            moved = thetas[rows] + torch.tensor(reach * one.stream.direction, dtype=torch.float32)
            with torch.no_grad():
                ahead = setting.forest.joint(moved)
            before, after = (batches.logps(x, 0, batch, rows) for x in (joint[rows], ahead))
            curvature = setting.objective.curvature(before, after).double().mean(dim=1).numpy()
            measured.append((one, curvature / reach[:, 0] ** 2))
    return torch.cat(found[0]), torch.cat(found[1]), measured


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
    log, seeds = RowLog(folder / RUNS_FILE), range(config.seed, config.seed + config.seeds)
    work = [(o, h, m) for o in config.optimizers for h in config.horizons for m in config.drawn]
    rows: list[dict[str, Any]] = []
    settings: dict[int, Setting] = {}
    work.sort(key=lambda one: one[1])  # cheap settings first
    with progress("Training enumerable models", len(work), "settings") as advance:
        for optimizer, horizon, model in work:
            keys = [
                {"optimizer": optimizer, "horizon": horizon, "model": model.number, "method": method.name, "size": size,
                 "seed": seed}
                for method in methods for size in range(3) for seed in seeds
            ]  # fmt: skip

            def compute(
                optimizer: str = optimizer, horizon: int = horizon, model: DrawnModel = model
            ) -> Sequence[dict[str, Any]]:
                if model.number not in settings:
                    settings[model.number] = Setting(model)
                return train(settings[model.number], optimizer, horizon, methods, seeds, config.batch_size)

            rows += log.rows(keys, compute)
            advance(1)
    return OracleTrainingReport.of(config.to_dict(), [asdict(method) for method in methods], rows, len(work))
