"""What an alpha-star report is made of: weights with their sets, curves, layers, diagnostics, ready for JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from bvpo_stats.statistics.alpha import AlphaInterval, SetShape
from bvpo_stats.statistics.intervals import Method, SimpleInterval


@dataclass(frozen=True)
class Weight:
    """A mixing weight with its confidence set, ready for JSON (None where a number does not exist).

    Attributes:
        value: Minimiser in [0, 1] of the estimated error; not to be quoted unless ``identified``.
        low: Lower end of the set, clipped to [0, 1].
        high: Upper end, clipped.
        level: Confidence level.
        unclipped: Ratio estimate before clipping.
        identified: Whether these prompts say anything about the weight.
        shape: ``bounded``: the unclipped set is ``[unclipped_low, unclipped_high]``; ``complement``: all but what lies
            between; ``whole``: every number.
        unclipped_low: See ``shape``.
        unclipped_high: See ``shape``.
        method: How the set was made.
        prompts_needed: How many prompts would identify it, where these do not and such a number exists.
        needed_is_bound: Whether that number is only a lower bound.
    """

    value: float | None
    low: float
    high: float
    level: float
    unclipped: float | None
    identified: bool
    shape: SetShape
    unclipped_low: float | None
    unclipped_high: float | None
    method: Method
    prompts_needed: int | None = None
    needed_is_bound: bool = False

    @classmethod
    def of(cls, interval: AlphaInterval) -> Weight:
        """The report's form of an interval."""
        return cls(
            value=finite(interval.value),
            low=interval.low,
            high=interval.high,
            level=interval.level,
            unclipped=finite(interval.unclipped),
            identified=interval.identified,
            shape=interval.shape,
            unclipped_low=finite(interval.unclipped_low),
            unclipped_high=finite(interval.unclipped_high),
            method=interval.method,
            prompts_needed=interval.needed.prompts if interval.needed else None,
            needed_is_bound=bool(interval.needed and interval.needed.at_least),
        )

    def __str__(self) -> str:
        if self.identified and self.value is not None:
            return f"{self.value:.3f}"
        return "not identified"

    @property
    def range_text(self) -> str:
        """The interval in words, or what would be needed for one."""
        if self.identified:
            return f"{self.low:.3f} to {self.high:.3f}"
        if self.prompts_needed is None:
            return "no number of prompts in sight"
        return f"{'at least' if self.needed_is_bound else 'about'} {self.prompts_needed:,} prompts needed"


@dataclass(frozen=True)
class Uncertainty:
    """Spread of an estimate that stands elsewhere in the report.

    Attributes:
        standard_error: Jackknife standard error.
        low: Lower end of the interval.
        high: Upper end.
    """

    standard_error: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, interval: SimpleInterval) -> Uncertainty:
        """The report's form of an interval."""
        return cls(*(finite(float(x)) for x in (interval.standard_error, interval.low, interval.high)))


@dataclass(frozen=True)
class CurvePoint:
    """alpha* at another batch size or step size."""

    batch_size: float
    eta_l: float
    alpha: float | None
    low: float
    high: float
    identified: bool


@dataclass(frozen=True)
class Layer:
    """alpha* of one parameter block.

    Attributes:
        block: Name of the block.
        alpha: Its weight.
        low: Lower end.
        high: Upper end.
        identified: Whether these prompts identify it.
        curvature: ``A_l``, its say in the global alpha.
    """

    block: str
    alpha: float | None
    low: float
    high: float
    identified: bool
    curvature: float | None


@dataclass(frozen=True)
class LayerGain:
    """What per-layer weights save over one weight for all, ``sum_l A_l (alpha_l - alpha)^2``."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Verdict:
    """Whether a fixed weight beats both parts: iff it lies in ``(2 alpha_unc - 1, 2 alpha_unc)``."""

    alpha: float
    beats_trace: str
    beats_empty: str
    window_low: float | None
    window_high: float | None
    sentence: str


@dataclass(frozen=True)
class Marginal:
    """Where mu came from and how far its weights can be trusted.

    Attributes:
        method: Estimator of the marginal gradient.
        rung: Step of the ladder that it stands on.
        reason: Why that one.
        estimable: Whether mu can be had; if not, nothing in the report is called alpha*.
        traces_per_answer: K, traces behind each answer (median).
        ess: Effective number of traces (median over answers).
        largest_weight: Largest normalised weight (median over answers).
        anchor_gap: J, the Jeffreys divergence between posterior and proposal in nats (median over answers); ``J <= log
            K`` certifies.
        log_traces: log K.
        k_hat: Pareto tail index (median over answers); None where K < 25 is too few for a fit.
        k_threshold: What it must stay below.
        certified_share: Share of answers whose weights pass their tests; None where no test could be made.
        half_split: Unclipped alpha from one half of the traces less that from the other; its interval; do they agree?
        answers: Per answer: ``ess`` and ``anchor_gap``, for the figure.
    """

    method: str
    rung: str | None
    reason: str
    estimable: bool
    traces_per_answer: float | None = None
    ess: float | None = None
    largest_weight: float | None = None
    anchor_gap: float | None = None
    log_traces: float | None = None
    k_hat: float | None = None
    k_threshold: float | None = None
    certified_share: float | None = None
    half_split: dict[str, Any] | None = None
    answers: dict[str, list[float | None]] = field(default_factory=dict)


def finite(value: float) -> float | None:
    """The number, or None for NaN and infinities, which JSON has no word for."""
    return float(value) if math.isfinite(value) else None
