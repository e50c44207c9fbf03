"""The alpha-star report: everything that its table, its figures and its files are made from."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.alpha import AlphaInterval, SetShape
from bvpo_stats.statistics.intervals import Method, SimpleInterval
from bvpo_stats.studies.report_file import to_json

T = TypeVar("T")


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
        half_split: Unclipped alpha from either half of the traces, and whether the two agree.
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


@dataclass(frozen=True)
class AlphaReport:
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
        mse: Errors of ``trace``, ``empty``, ``zero``, ``half`` (the paper's 0.5), ``alpha_star``, ``shrunk_trace``.
        bias_sq: ``trace``: norm(b_t)^2, ``empty``: norm(b_e)^2, ``cross``: b_t . b_e.
        variance: Per example: ``trace``, ``empty``, ``cross`` and ``trace_sampling`` (Theorem 1's part of ``trace``).
        trace_sampling_share: ``trace_sampling / trace``.
        uncertainty: Standard errors and intervals of ``mse``, ``bias_sq`` and ``variance``, by the same names.
        curve: alpha* over batch sizes.
        parabola: ``alpha``, ``value``, ``low``, ``high`` of the error over alpha.
        verdict: On the paper's 0.5.
        layers: Per block.
        layer_gain: What they save.
        marginal: Where mu came from.
        warnings: What a reader must know before quoting a number.
        versions: Software.
    """

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
    mse: dict[str, float | None]
    bias_sq: dict[str, float | None]
    variance: dict[str, float | None]
    trace_sampling_share: Weight | None
    uncertainty: dict[str, dict[str, Uncertainty]]
    curve: list[CurvePoint]
    parabola: dict[str, list[float]]
    verdict: Verdict | None
    layers: list[Layer]
    layer_gain: LayerGain | None
    marginal: Marginal
    warnings: list[str]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The report as it stands in ``report.json``."""
        return {"study": "alpha-star", **asdict(self)}

    def to_json(self) -> str:
        """The text of ``report.json``."""
        return to_json(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> AlphaReport:
        """Reads what `to_json` wrote.

        Raises:
            UserError: Not JSON, or not an alpha-star report.
        """
        try:
            plain = json.loads(text)
        except ValueError as error:
            raise UserError(f"This is not JSON ({error}). Give the report.json of an alpha-star run.") from error
        return cls.from_dict(plain)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> AlphaReport:
        """Reads what `to_dict` made.

        Raises:
            UserError: Not an alpha-star report.
        """
        try:
            return cls(**cls._values(plain))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"This is no alpha-star report ({error}). Give the report.json of such a run.") from error

    @classmethod
    def _values(cls, plain: dict[str, Any]) -> dict[str, Any]:
        values = {f.name: plain[f.name] for f in fields(cls)}
        kinds = {f.name: str(f.type).removesuffix(" | None") for f in fields(cls)}
        single = {"Weight": Weight, "Verdict": Verdict, "LayerGain": LayerGain, "Marginal": Marginal}
        several = {"list[CurvePoint]": CurvePoint, "list[Layer]": Layer}
        for name, value in values.items():
            if value is None:
                continue
            if kinds[name] in single:
                values[name] = _build(single[kinds[name]], value)
            elif kinds[name] in several:
                values[name] = [_build(several[kinds[name]], entry) for entry in value]
        values["uncertainty"] = {
            part: {name: _build(Uncertainty, entry) for name, entry in entries.items()}
            for part, entries in plain["uncertainty"].items()
        }
        return values

    def plot(self, folder: Path | str) -> list[Path]:
        """Draws the figures into a folder and returns their paths."""
        from bvpo_stats.plots import alpha_figures

        return alpha_figures(self.to_dict(), Path(folder))

    def _repr_html_(self) -> str:
        from bvpo_stats.studies.alpha_star_output import html

        return html(self)


def finite(value: float) -> float | None:
    """The number, or None for NaN and infinities, which JSON has no word for."""
    return float(value) if math.isfinite(value) else None


def _build(kind: type[T], value: dict[str, Any]) -> T:
    return kind(**value)
