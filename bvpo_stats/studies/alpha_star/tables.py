"""The numeric sections of the alpha-star report, each from the moments of one run."""

from __future__ import annotations

import numpy as np

from bvpo_stats.statistics.alpha import (
    alpha_curve,
    alpha_j,
    error_curve,
    error_table,
    fixed_alpha_verdict,
    layer_alphas,
    trace_sampling_share,
)
from bvpo_stats.statistics.estimates import estimates, noise_scale
from bvpo_stats.statistics.intervals import BIAS_EMPTY, BIAS_TRACE, SimpleInterval, jackknife_normal, squared_norm
from bvpo_stats.statistics.moments import Array, MomentSummary
from bvpo_stats.studies.alpha_star.entries import (
    CurvePoint,
    Layer,
    LayerGain,
    Uncertainty,
    Verdict,
    Weight,
    finite,
)
from bvpo_stats.studies.alpha_star.settings import AlphaSettings

PAPER_ALPHA = 0.5
_PARABOLA_POINTS = 41
_ZEROS = (np.zeros(()),) * 4


def curve_batch_sizes(n_prompts: int, batch_size: float) -> list[float]:
    """Powers of two up to the larger of the two numbers, with both of them.

    >>> curve_batch_sizes(6, 8)
    [1.0, 2.0, 4.0, 6.0, 8.0]
    """
    top = max(n_prompts, batch_size)
    powers = [float(2**k) for k in range(int(np.log2(top)) + 1)]
    return sorted({*powers, float(n_prompts), float(batch_size)})


def tables(
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
            "trace": squared_norm(summary, BIAS_TRACE, settings.level),
            "empty": squared_norm(summary, BIAS_EMPTY, settings.level),
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
    if summary.reference_point:
        # b_t = 0 by theory there; what arithmetic leaves of it is rounding.
        rows["bias_sq"] |= dict.fromkeys(("trace", "cross"), SimpleInterval(*_ZEROS, settings.level))
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


def sampling_share(summary: MomentSummary, level: float) -> Weight | None:
    """Share of ``tr Sigma_t`` that sampling the traces causes; None without second trace draws."""
    if summary.trace_sampling is None:
        return None
    return Weight.of(trace_sampling_share(summary, level=level))


def bound_alpha(summary: MomentSummary, settings: AlphaSettings) -> Weight | None:
    """alpha_J, which minimises the descent bound with no term dropped; None at eta L = 1, where it is alpha*."""
    if settings.eta_l >= 1:
        return None
    interval = alpha_j(
        summary, settings.eta_l, batch_size=settings.batch_size, level=settings.level, method=settings.method
    )
    return Weight.of(interval)


def curve_points(summary: MomentSummary, settings: AlphaSettings) -> list[CurvePoint]:
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


def parabola(summary: MomentSummary, settings: AlphaSettings) -> dict[str, list[float]]:
    """The error of a step over alpha, with its band."""
    alphas = np.linspace(0, 1, _PARABOLA_POINTS)
    tau = noise_scale(settings.batch_size, settings.eta_l)
    band = error_curve(summary, alphas, tau=tau, level=settings.level)
    columns = {"alpha": alphas, "value": band.value, "low": band.low, "high": band.high}
    return {name: [float(x) for x in column] for name, column in columns.items()}


def paper_verdict(summary: MomentSummary, settings: AlphaSettings) -> Verdict:
    """Whether the paper's alpha beats both of its parts."""
    verdict = fixed_alpha_verdict(
        summary,
        PAPER_ALPHA,
        batch_size=settings.batch_size,
        eta_l=settings.eta_l,
        level=settings.level,
        method=settings.method,
    )
    return Verdict(
        alpha=verdict.alpha,
        beats_trace=verdict.beats_trace,
        beats_empty=verdict.beats_empty,
        window_low=finite(verdict.window_low),
        window_high=finite(verdict.window_high),
        sentence=verdict.sentence,
    )


def layers_and_gain(summary: MomentSummary, settings: AlphaSettings) -> tuple[list[Layer], LayerGain | None]:
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
