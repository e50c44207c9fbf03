"""The alpha-star report: everything that its table, its figures and its files are made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bvpo_stats.statistics.bounds import AlphaRange
from bvpo_stats.studies.alpha_star.entries import (
    CurvePoint,
    Layer,
    LayerGain,
    Marginal,
    Uncertainty,
    Verdict,
    Weight,
)
from bvpo_stats.studies.base import Presentation, Report


@dataclass(frozen=True)
class AlphaReport(Report):
    """The answer to "which alpha, for my model, my batch size and my step size, and how sure are you?".

    All errors are those of one step, ``norm(bias)^2 + (eta L / B) Var``.

    Attributes:
        model: Identity of the policy.
        template: Its protocol.
        objective: Loss and its constants.
        subset: What the parameters are.
        n_prompts: Prompts (clusters).
        n_examples: Pairs of pairs.
        n_parameters: Dimension of theta.
        n_groups: Jackknife groups that hold prompts.
        seed: Seed of the run.
        level: Confidence level.
        batch_size: B.
        eta_l: Learning rate times smoothness.
        curvature: How ``eta_l`` was measured, None where it was given.
        alpha_star: alpha* at this B and eta L; None where mu is not estimable.
        alpha_var: Variance-only limit ``tr(Sigma_e - Sigma_te) / Q1``, which needs no mu. It is not alpha*.
        alpha_bias: Bias-only limit, what large batches tend to.
        alpha_j: Minimiser of the descent bound with no term dropped, where eta L < 1.
        alpha_adam: alpha* in Adam's metric, where an optimizer state was given.
        alpha_direction: Weight for optimizers that ignore a gradient's length.
        alpha_range: Where alpha* lies, after a small drift that leaves mu not estimable. It is no estimate of alpha*.
        mse: Errors of ``trace``, ``empty``, ``zero``, ``half`` (the paper's 0.5), ``alpha_star``, ``shrunk_trace``.
        bias_sq: ``trace``: norm(b_t)^2, ``empty``: norm(b_e)^2, ``cross``: b_t . b_e.
        variance: Per example: ``trace``, ``empty``, ``cross`` and ``trace_sampling`` (Theorem 1's part of ``trace``).
        trace_sampling_share: ``trace_sampling / trace``.
        n_second_draws: Examples behind ``trace_sampling``: those with a second trace draw for both answers.
        uncertainty: Standard errors and intervals of ``mse``, ``bias_sq`` and ``variance``, by the same names.
        curve: alpha* over batch sizes.
        parabola: ``alpha``, ``value``, ``low``, ``high`` of the error over alpha.
        verdict: On the paper's 0.5.
        layers: Per block.
        layer_gain: What they save.
        marginal: Where mu came from.
        warnings: What a reader must know before quoting a number.
    """

    study: ClassVar[str] = "alpha-star"

    model: str
    template: str
    objective: dict[str, Any]
    subset: str
    n_prompts: int
    n_examples: int
    n_parameters: int
    n_groups: int
    seed: int
    level: float
    batch_size: float
    eta_l: float
    curvature: dict[str, Any] | None
    alpha_star: Weight | None
    alpha_var: Weight
    alpha_bias: Weight | None
    alpha_j: Weight | None
    alpha_adam: Weight | None
    alpha_direction: Weight | None
    alpha_range: AlphaRange | None
    mse: dict[str, float | None]
    bias_sq: dict[str, float | None]
    variance: dict[str, float | None]
    trace_sampling_share: Weight | None
    n_second_draws: int
    uncertainty: dict[str, dict[str, Uncertainty]]
    curve: list[CurvePoint]
    parabola: dict[str, list[float]]
    verdict: Verdict | None
    layers: list[Layer]
    layer_gain: LayerGain | None
    marginal: Marginal
    warnings: list[str]

    def present(self) -> Presentation:
        """The weights, errors, biases and variances, and the verdict in a sentence."""
        from bvpo_stats.studies.alpha_star.output import present

        return present(self)

    def figures(self, folder: Path) -> list[Path]:
        """Error over alpha, alpha over batch sizes, alpha by layer; what the data cannot fill is left out."""
        from bvpo_stats.studies.alpha_star.figures import alpha_figures

        return alpha_figures(self.to_dict(), folder)
