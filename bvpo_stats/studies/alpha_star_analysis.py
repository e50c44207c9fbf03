"""From streamed moments to the alpha-star report: pure arithmetic, no language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.alpha import alpha_from_summary
from bvpo_stats.statistics.curves import alpha_curve, alpha_j, alpha_limits, error_curve
from bvpo_stats.statistics.estimates import estimates, noise_scale
from bvpo_stats.statistics.half_split import half_split
from bvpo_stats.statistics.intervals import Method, SimpleInterval, jackknife_normal, t_quantile
from bvpo_stats.statistics.layers import direction_alpha, layer_alphas
from bvpo_stats.statistics.summary import Array, MomentSummary
from bvpo_stats.statistics.verdicts import error_table, fixed_alpha_verdict, trace_sampling_share
from bvpo_stats.studies.alpha_star_report import (
    AlphaReport,
    CurvePoint,
    Layer,
    LayerGain,
    Marginal,
    Uncertainty,
    Verdict,
    Weight,
    finite,
)
from bvpo_stats.studies.report_file import versions

PAPER_ALPHA = 0.5
_PARABOLA_POINTS = 41


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
            raise UserError(f"--interval {self.method}: choose {', '.join(get_args(Method))}.")


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


def analyse(
    summary: MomentSummary,
    marginal: Marginal,
    settings: AlphaSettings,
    context: AlphaContext,
    adam: MomentSummary | None = None,
) -> AlphaReport:
    """Everything the report holds, from the moments of one run.

    Where mu is not estimable, no number that rests on it is formed: alpha*, the squared biases and the errors are None,
    and what remains is called by its own names (variances, ``alpha_var``).

    Args:
        summary: Moments of ``t``, ``e`` and, unless at the reference point, ``m``.
        marginal: Where mu came from.
        settings: Batch size, step size, level.
        context: What else the report says.
        adam: The same moments in Adam's metric.
    """
    known = marginal.estimable
    batch_size, eta_l = settings.batch_size, settings.eta_l
    level, method = settings.level, settings.method

    def star_of(moments: MomentSummary) -> Weight:
        found = alpha_from_summary(moments, batch_size=batch_size, eta_l=eta_l, level=level, method=method)
        return Weight.of(found)

    def direction_of(moments: MomentSummary) -> Weight:
        found = direction_alpha(moments, batch_size=batch_size, eta_l=eta_l, level=level, method=method)
        return Weight.of(found)

    limits = alpha_limits(summary, level=level, method=method)
    values, spread = _tables(summary, settings, known)
    if "m1" in summary.members:
        marginal = _with_half_split(summary, marginal, settings)
    star = star_of(summary) if known else None
    layers, gain = _layers(summary, settings) if known else ([], None)
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
        level=level,
        batch_size=settings.batch_size,
        eta_l=settings.eta_l,
        curvature=context.curvature,
        alpha_star=star,
        alpha_var=Weight.of(limits.variance_only),
        alpha_bias=Weight.of(limits.bias_only) if known else None,
        alpha_j=_alpha_j(summary, settings) if known else None,
        alpha_adam=None if adam is None or not known else star_of(adam),
        alpha_direction=direction_of(summary) if known else None,
        mse=values["mse"],
        bias_sq=values["bias_sq"],
        variance=values["variance"],
        trace_sampling_share=_share(summary, level),
        uncertainty=spread,
        curve=_curve(summary, settings) if known else [],
        parabola=_parabola(summary, settings) if known else {},
        verdict=_verdict(summary, settings) if known else None,
        layers=layers,
        layer_gain=gain,
        marginal=marginal,
        warnings=[*context.warnings, *_warnings(summary, marginal, star, values)],
        versions=versions(),
    )


def curve_batch_sizes(n_prompts: int, batch_size: float) -> list[float]:
    """Powers of two up to the larger of the two numbers, with both of them.

    >>> curve_batch_sizes(6, 8)
    [1.0, 2.0, 4.0, 6.0, 8.0]
    """
    top = max(n_prompts, batch_size)
    powers = [float(2**k) for k in range(int(np.log2(top)) + 1)]
    return sorted({*powers, float(n_prompts), float(batch_size)})


def _tables(
    summary: MomentSummary, settings: AlphaSettings, known: bool
) -> tuple[dict[str, dict[str, float | None]], dict[str, dict[str, Uncertainty]]]:
    """``mse``, ``bias_sq`` and ``variance``: values, and their uncertainty under the same names."""
    parts = estimates(summary)
    errors = error_table(
        summary,
        alpha=PAPER_ALPHA,
        batch_size=settings.batch_size,
        eta_l=settings.eta_l,
        level=settings.level,
    )
    names = {"trace": "trace", "empty": "empty", "zero": "zero", "half": "fixed", "alpha_star": "alpha_star",
             "shrunk_trace": "shrunk_trace"}  # fmt: skip
    rows: dict[str, dict[str, SimpleInterval | None]] = {
        "mse": {name: errors[key] for name, key in names.items()},
        "bias_sq": {
            "trace": _interval(parts.bias_trace_sq, summary, settings.level, floor=0.0),
            "empty": _interval(parts.bias_empty_sq, summary, settings.level, floor=0.0),
            "cross": _interval(parts.bias_cross, summary, settings.level),
        },
        "variance": {
            "trace": _interval(parts.var_trace, summary, settings.level, floor=0.0),
            "empty": _interval(parts.var_empty, summary, settings.level, floor=0.0),
            "cross": _interval(parts.var_cross, summary, settings.level),
            "trace_sampling": None
            if parts.var_trace_sampling is None
            else _interval(parts.var_trace_sampling, summary, settings.level, floor=0.0),
        },
    }
    if not known:
        rows["mse"] = dict.fromkeys(rows["mse"])
        rows["bias_sq"] = dict.fromkeys(rows["bias_sq"])
    values = {
        part: {name: None if row is None else finite(float(row.value)) for name, row in entries.items()}
        for part, entries in rows.items()
    }
    spread = {
        part: {name: Uncertainty.of(row) for name, row in entries.items() if row is not None}
        for part, entries in rows.items()
    }
    return values, spread


def _interval(values: Array, summary: MomentSummary, level: float, floor: float | None = None) -> SimpleInterval:
    return jackknife_normal(values, summary.group_sizes, level, floor=floor)


def _share(summary: MomentSummary, level: float) -> Weight | None:
    if summary.trace_sampling is None:
        return None
    return Weight.of(trace_sampling_share(summary, level=level))


def _alpha_j(summary: MomentSummary, settings: AlphaSettings) -> Weight | None:
    if settings.eta_l >= 1:
        return None
    interval = alpha_j(
        summary, settings.eta_l, batch_size=settings.batch_size, level=settings.level, method=settings.method
    )
    return Weight.of(interval)


def _curve(summary: MomentSummary, settings: AlphaSettings) -> list[CurvePoint]:
    """alpha* over batch sizes at the given eta L, and at 1, the edge of Theorem 3's condition."""
    sizes = curve_batch_sizes(summary.n_prompts, settings.batch_size)
    points = []
    for eta_l in sorted({settings.eta_l, 1.0}):
        curve = alpha_curve(summary, sizes, eta_l=eta_l, level=settings.level, method=settings.method)
        columns = (curve.batch_size, curve.alpha, curve.low, curve.high, curve.identified)
        points += [
            CurvePoint(float(size), eta_l, finite(alpha), float(low), float(high), bool(identified))
            for size, alpha, low, high, identified in zip(*columns, strict=True)
        ]
    return points


def _parabola(summary: MomentSummary, settings: AlphaSettings) -> dict[str, list[float]]:
    alphas = np.linspace(0, 1, _PARABOLA_POINTS)
    tau = noise_scale(settings.batch_size, settings.eta_l)
    band = error_curve(summary, alphas, tau=tau, level=settings.level)
    columns = {"alpha": alphas, "value": band.value, "low": band.low, "high": band.high}
    return {name: [float(x) for x in column] for name, column in columns.items()}


def _verdict(summary: MomentSummary, settings: AlphaSettings) -> Verdict:
    verdict = fixed_alpha_verdict(
        summary, PAPER_ALPHA, batch_size=settings.batch_size, eta_l=settings.eta_l, level=settings.level
    )
    return Verdict(
        alpha=verdict.alpha,
        beats_trace=verdict.beats_trace,
        beats_empty=verdict.beats_empty,
        window_low=finite(verdict.window_low),
        window_high=finite(verdict.window_high),
        sentence=verdict.sentence,
    )


def _layers(summary: MomentSummary, settings: AlphaSettings) -> tuple[list[Layer], LayerGain | None]:
    """Weights of the blocks; blocks that never get a gradient (LoRA's A at its start) are left out."""
    if len(summary.blocks) < 2:
        return [], None
    found = layer_alphas(
        summary,
        batch_size=settings.batch_size,
        eta_l=settings.eta_l,
        level=settings.level,
        method=settings.method,
    )
    layers = [
        Layer(name, finite(alpha.value), alpha.low, alpha.high, alpha.identified, finite(found.weights[name]))
        for name, alpha in found.alphas.items()
        if np.isfinite(alpha.value)
    ]
    gain = found.gain
    if gain is None:
        return layers, None
    return layers, LayerGain(*(finite(float(x)) for x in (gain.value, gain.low, gain.high)))


def _with_half_split(summary: MomentSummary, marginal: Marginal, settings: AlphaSettings) -> Marginal:
    split = half_split(summary, batch_size=settings.batch_size, eta_l=settings.eta_l, level=settings.level)
    plain = {name: finite(value) if isinstance(value, float) else value for name, value in vars(split).items()}
    return Marginal(**{**vars(marginal), "half_split": plain})


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
        found.append("The two halves of the traces give different alphas: the weights behind mu have collapsed.")
    return found


def check_groups(n_prompts: int, groups: int) -> None:
    """Refuses a jackknife with more groups than prompts.

    Raises:
        UserError: Fewer prompts than groups.
    """
    if n_prompts < groups:
        raise UserError(
            f"{n_prompts} prompts with both a D_t and a D_e pair are fewer than the {groups} jackknife groups; give "
            "more pairs (some hundred are usual)."
        )
