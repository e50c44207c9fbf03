"""From streamed moments to the alpha-star report: pure arithmetic, no language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.alpha import alpha_from_summary, alpha_limits, direction_alpha, half_split
from bvpo_stats.statistics.bounds import AlphaRange, DriftBound, alpha_range
from bvpo_stats.statistics.moments import MomentSummary
from bvpo_stats.studies.alpha_star.entries import Marginal, Weight, finite
from bvpo_stats.studies.alpha_star.report import AlphaReport
from bvpo_stats.studies.alpha_star.settings import AlphaContext, AlphaSettings
from bvpo_stats.studies.alpha_star.tables import (
    bound_alpha,
    curve_points,
    layers_and_gain,
    paper_verdict,
    parabola,
    sampling_share,
    tables,
)


@dataclass(frozen=True)
class Measured:
    """What a run measured.

    Attributes:
        summary: Moments of ``t``, ``e`` and, unless at the reference point, ``m``.
        marginal: Where mu came from.
        n_second_draws: Examples with a second trace draw.
        adam: The same moments in Adam's metric, where an optimizer state was given.
        halves: Moments of ``t - e`` and of the difference of m from either half of the traces, where there are halves.
        drift: Bound on g_t's bias, where mu is not estimable and the drift is small.
    """

    summary: MomentSummary
    marginal: Marginal
    n_second_draws: int = 0
    adam: MomentSummary | None = None
    halves: MomentSummary | None = None
    drift: DriftBound | None = None


def analyse(measured: Measured, settings: AlphaSettings, context: AlphaContext) -> AlphaReport:
    """Everything the report holds, from the moments of one run.

    Where mu is not estimable, no number that rests on it is formed: alpha*, the squared biases and the errors are None,
    and what remains is called by its own names (variances, ``alpha_var``, and ``alpha_range`` after a small drift).

    Args:
        measured: What the run measured.
        settings: Batch size, step size, level.
        context: What else the report says.
    """
    summary, marginal = measured.summary, measured.marginal
    known = marginal.estimable
    values, spread = tables(summary, settings, known)
    if measured.halves is not None:
        marginal = replace(marginal, half_split=_half_split(summary, measured.halves, settings))
    weights = _weights(measured, settings)
    layers, gain = layers_and_gain(summary, settings) if known else ([], None)
    found = _warnings(summary, marginal, weights["alpha_star"], values)
    return AlphaReport(
        model=context.model,
        template=context.template,
        objective=context.objective,
        subset=context.subset,
        n_prompts=summary.n_prompts,
        n_examples=summary.n_examples,
        n_parameters=context.n_parameters,
        n_groups=summary.n_groups,
        seed=context.seed,
        level=settings.level,
        batch_size=settings.batch_size,
        eta_l=settings.eta_l,
        curvature=context.curvature,
        **weights,
        alpha_range=_range(measured, settings),
        mse=values["mse"],
        bias_sq=values["bias_sq"],
        variance=values["variance"],
        trace_sampling_share=sampling_share(summary, settings.level),
        n_second_draws=measured.n_second_draws,
        uncertainty=spread,
        curve=curve_points(summary, settings) if known else [],
        parabola=parabola(summary, settings) if known else {},
        verdict=paper_verdict(summary, settings) if known else None,
        layers=layers,
        layer_gain=gain,
        marginal=marginal,
        warnings=[*context.warnings, *found],
    )


def _weights(measured: Measured, settings: AlphaSettings) -> dict[str, Any]:
    """Every mixing weight of the report by its name there; all but ``alpha_var`` need mu."""
    summary, adam = measured.summary, measured.adam
    how: dict[str, Any] = {"level": settings.level, "method": settings.method}
    limits = alpha_limits(summary, **how)
    names = ("alpha_star", "alpha_bias", "alpha_j", "alpha_adam", "alpha_direction")
    weights: dict[str, Any] = {"alpha_var": Weight.of(limits.variance_only), **dict.fromkeys(names)}
    if not measured.marginal.estimable:
        return weights
    how |= {"batch_size": settings.batch_size, "eta_l": settings.eta_l}
    return weights | {
        "alpha_star": Weight.of(alpha_from_summary(summary, **how)),
        "alpha_bias": Weight.of(limits.bias_only),
        "alpha_j": bound_alpha(summary, settings),
        "alpha_adam": None if adam is None else Weight.of(alpha_from_summary(adam, **how)),
        "alpha_direction": Weight.of(direction_alpha(summary, **how)),
    }


def _range(measured: Measured, settings: AlphaSettings) -> AlphaRange | None:
    if measured.drift is None:
        return None
    return alpha_range(
        measured.summary,
        measured.drift,
        batch_size=settings.batch_size,
        eta_l=settings.eta_l,
        level=settings.level,
        method=settings.method,
    )


def _half_split(summary: MomentSummary, halves: MomentSummary, settings: AlphaSettings) -> dict[str, Any]:
    split = half_split(summary, halves, batch_size=settings.batch_size, eta_l=settings.eta_l, level=settings.level)
    return {name: finite(value) if isinstance(value, float) else value for name, value in vars(split).items()}


def _warnings(
    summary: MomentSummary,
    marginal: Marginal,
    star: Weight | None,
    values: dict[str, dict[str, float | None]],
) -> list[str]:
    found = []
    if not marginal.estimable:
        found.append(
            f"mu is not estimable ({marginal.reason}); there is no alpha* here. alpha_var is the weight that minimises "
            "variance alone."
        )
    elif star is not None and not star.identified:
        found.append(f"alpha* is not identified at {summary.n_prompts} prompts: {star.range_text}.")
    zero, best = values["mse"]["zero"], values["mse"]["alpha_star"]
    if zero is not None and best is not None and zero < best:
        found.append(
            "The zero vector has less error than any mix: at this batch size noise outweighs the signal. Mean squared "
            "error rewards small vectors; raise the batch size before you compare directions."
        )
    if marginal.half_split is not None and not marginal.half_split["agrees"]:
        found.append(
            "The two halves of the traces give different alphas: mu depends on which traces were drawn. Look at the "
            "effective sizes, and make a bank with more traces."
        )
    return found


def check_groups(n_prompts: int, groups: int | Literal["auto"]) -> None:
    """Refuses a jackknife with more groups than prompts.

    Raises:
        UserError: Fewer prompts than groups, or than three.
    """
    if n_prompts < (3 if groups == "auto" else groups):
        least = "three, the least for an interval" if groups == "auto" else f"the {groups} jackknife groups"
        raise UserError(
            f"{n_prompts} prompts with both a D_t and a D_e pair are fewer than {least}; give more pairs (some hundred "
            "are usual)."
        )
