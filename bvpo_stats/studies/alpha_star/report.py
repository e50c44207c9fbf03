"""The alpha-star report: from the moments of a run to every number, table and sentence. No language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.sampling.scoring import SamplerRatio
from bvpo_stats.statistics.alpha import (
    AlphaInterval,
    alpha_curve,
    alpha_from_summary,
    alpha_j,
    alpha_limits,
    direction_alpha,
    error_curve,
    error_table,
    fixed_alpha_verdict,
    half_split,
    layer_alphas,
    trace_sampling_share,
)
from bvpo_stats.statistics.bounds import AlphaRange, DriftBound, alpha_range
from bvpo_stats.statistics.estimates import LinearRatio, estimates, noise_scale
from bvpo_stats.statistics.intervals import (
    BIAS_EMPTY,
    BIAS_TRACE,
    BOUNDED,
    FEWEST,
    SimpleInterval,
    jackknife_normal,
    ratio_sets,
    squared_norm,
    t_quantile,
)
from bvpo_stats.statistics.mixtures import CHOICES, Advice, budget_advice, excess_error, trace_mixture
from bvpo_stats.statistics.moments import Array, MomentSummary
from bvpo_stats.statistics.proportions import Interval
from bvpo_stats.studies.base import Finding, Mark, Presentation, Report, ResultTable, few_cautions, number

PAPER_ALPHA = 0.5
MIN_SECOND_DRAWS = 10
"""Examples with a second trace draw without which nothing is said of mixtures of several traces."""
_PARABOLA_POINTS = 41
_ZEROS = (np.zeros(()),) * 4
_ERRORS = {
    "trace": "g_t, with traces",
    "empty": "g_e, empty trace",
    "half": "mix, alpha = 0.5 (the paper's)",
    "alpha_star": "mix, alpha = alpha*",
    "shrunk_trace": "g_t, best multiple of it",
    "zero": "zero vector",
}
_BIASES = {"trace": "norm(b_t)^2", "empty": "norm(b_e)^2", "cross": "b_t . b_e"}
_VARIANCES = {
    "trace": "tr Sigma_t",
    "trace_sampling": "  of which sampling of traces",
    "empty": "tr Sigma_e",
    "cross": "tr Sigma_te",
}
_NO_INTERVAL = "not estimable"
_AT_REFERENCE = "an identity here: b_t = 0"
Row = tuple[str, ...]
"""Label, value and interval; of mixing weights also n_eff and the largest prompt's share of the variance."""
_WEIGHTS = "Mixing weight"


def finite(value: float) -> float | None:
    """The number, or None for NaN and infinities, which JSON has no word for."""
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class AlphaSettings:
    """What alpha* is asked for.

    Attributes:
        batch_size: Examples per optimizer step, B.
        eta_l: Learning rate times smoothness.
        level: Confidence level.
    """

    batch_size: float = 128.0
    eta_l: float = 1.0
    level: float = 0.95

    def __post_init__(self) -> None:
        noise_scale(self.batch_size, self.eta_l)
        t_quantile(self.level, 20)


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
        unclipped_low: Lower end before clipping; None where the set is not bounded.
        unclipped_high: Upper end likewise.
        n_eff: Effective prompts behind the estimate, ``(sum psi^2)^2 / sum psi^4``; few of them identify nothing.
        largest_share: The largest prompt's share of the variance.
        prompts_needed: How many prompts would identify it, where these do not and such a number exists.
        needed_is_bound: Whether that number is only a lower bound.
        identity: Why the weight is what it is without any data, where it is: nothing was measured then.
    """

    value: float | None
    low: float
    high: float
    level: float
    unclipped: float | None
    identified: bool
    unclipped_low: float | None
    unclipped_high: float | None
    n_eff: float | None
    largest_share: float | None
    prompts_needed: int | None = None
    needed_is_bound: bool = False
    identity: str | None = None

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
            unclipped_low=finite(interval.unclipped_low),
            unclipped_high=finite(interval.unclipped_high),
            n_eff=finite(interval.n_eff),
            largest_share=finite(interval.largest),
            prompts_needed=interval.needed.prompts if interval.needed else None,
            needed_is_bound=bool(interval.needed and interval.needed.at_least),
        )

    def __str__(self) -> str:
        if self.value is None:
            return "not identified"
        if self.identity is not None:
            return f"{self.value:g}"
        return f"{self.value:.3f}" if self.identified else f"({self.value:.3f}) not identified"

    @property
    def range_text(self) -> str:
        """The interval in words, or what would be needed for one, or why there is none to measure."""
        if self.identity is not None:
            return self.identity
        if self.identified:
            return f"{self.low:.3f} to {self.high:.3f}"
        if self.n_eff is not None and self.n_eff < FEWEST:
            return "too few prompts rule it"
        if self.prompts_needed is None:
            return "no number of prompts in sight"
        return f"{'at least' if self.needed_is_bound else 'about'} {self.prompts_needed:,} prompts needed"

    @property
    def reach_text(self) -> str:
        """How many effective prompts it rests on, and the largest one's share."""
        if self.identity is not None or self.n_eff is None or self.largest_share is None:
            return "-"
        return f"{self.n_eff:.1f} ({self.largest_share:.0%})"


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
    n_eff: float | None
    largest_share: float | None


@dataclass(frozen=True)
class Layer:
    """alpha* of one parameter block.

    Attributes:
        block: Name of the block.
        alpha: Its weight.
        low: Lower end.
        high: Upper end.
        identified: Whether these prompts identify it.
        n_eff: Effective prompts behind it.
        largest_share: The largest prompt's share of its variance.
        curvature: ``A_l``, its say in the global alpha.
    """

    block: str
    alpha: float | None
    low: float
    high: float
    identified: bool
    n_eff: float | None
    largest_share: float | None
    curvature: float | None


@dataclass(frozen=True)
class Verdict:
    """Whether a fixed weight beats both parts: iff it lies in ``(2 alpha_unc - 1, 2 alpha_unc)``."""

    alpha: float
    beats_trace: str
    beats_empty: str
    window_low: float | None
    window_high: float | None
    sentence: str


OptimizerName = Literal["adamw", "sgd"]


@dataclass(frozen=True)
class StepAlpha:
    """alpha* of an optimizer's steps under one reading of its step size.

    Attributes:
        where: ``theorem4`` (eta L = 1), ``measured``, or ``direction`` (the length is free: tau = 1 / B).
        eta_l: Learning rate times smoothness; None for direction only.
        alpha: The weight.
        excess: Share of the paper's 0.5's error that it saves; None where the errors say nothing.
        excess_low: Lower end, clipped to [0, 1].
        excess_high: Upper end, likewise.
    """

    where: str
    eta_l: float | None
    alpha: Weight
    excess: float | None
    excess_low: float
    excess_high: float


@dataclass(frozen=True)
class OptimizerStep:
    """eta L of an optimizer's steps and alpha* in its metric P: every product is x' P y.

    ``eta L = eta tr(P H P Sigma) / tr(P Sigma)``, Sigma = Cov(g_t - g_e), H Gauss-Newton's, no pair along its own h_i.

    Attributes:
        name: ``adamw`` or ``sgd``.
        learning_rate: eta.
        metric: P, and where it comes from.
        eta_l: eta L.
        eta_l_low: Lower end of its interval; None where there is none.
        eta_l_high: Upper end, likewise.
        n_pairs: D_t pairs behind H.
        alphas: At eta L = 1, at the measured value, and for direction only; empty where mu is not estimable.
    """

    name: OptimizerName
    learning_rate: float
    metric: str
    eta_l: float
    eta_l_low: float | None
    eta_l_high: float | None
    n_pairs: int
    alphas: list[StepAlpha] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        summary: MomentSummary,
        curved: Array,
        n_pairs: int,
        *,
        name: OptimizerName,
        learning_rate: float,
        metric: str,
        settings: AlphaSettings,
    ) -> OptimizerStep:
        """From moments in the optimizer's metric and ``tr(P H P Sigma)``, ``[1 + G]``; `with_alphas` adds the weights.

        Raises:
            UserError: There is no noise to measure along, or no curvature along it.
        """
        rows = learning_rate * curved
        size = estimates(summary).Q1
        if not (rows[0] > 0 and size[0] > 0 and np.isfinite(rows[0] / size[0])):
            raise UserError(
                f"`optimizer={name!r}`: eta L cannot be measured, for the loss has no curvature along the noise of "
                f"g_t - g_e (tr P H P Sigma = {curved[0]:.3g}, tr P Sigma = {size[0]:.3g}); give a number for `eta_l`."
            )
        sets = ratio_sets(LinearRatio.of_rows(rows, size, summary), settings.level)
        low, high = (finite(float(end)) if sets.shape == BOUNDED else None for end in (sets.low, sets.high))
        return cls(
            name, learning_rate, metric, float(sets.ratio), None if low is None else max(low, 0.0), high, n_pairs
        )

    def with_alphas(self, summary: MomentSummary, settings: AlphaSettings) -> OptimizerStep:
        """The weights, from the same moments, where mu is known."""
        how: dict[str, Any] = {"batch_size": settings.batch_size, "level": settings.level}
        found = []
        places: dict[str, float | None] = {"theorem4": 1.0, "measured": self.eta_l, "direction": None}
        for where, eta_l in places.items():
            alpha: AlphaInterval
            if eta_l is None:
                alpha = direction_alpha(summary, **how)
            else:
                alpha = alpha_from_summary(summary, eta_l=eta_l, **how)
            cost = excess_error(summary, PAPER_ALPHA, eta_l=eta_l, **how)
            found.append(StepAlpha(where, eta_l, Weight.of(alpha), finite(cost.value), cost.low, cost.high))
        return replace(self, alphas=found)

    def rows(self, batch_size: float) -> list[Row]:
        """The table."""
        low, high = number(self.eta_l_low), number(self.eta_l_high)
        rows: list[Row] = [(f"eta L at learning rate {self.learning_rate:g}", number(self.eta_l), f"{low} to {high}")]
        words = {
            "theorem4": "alpha* at eta L = 1 (Theorem 4)",
            "measured": f"alpha* at eta L = {self.eta_l:.3g}, measured",
            "direction": f"alpha* for direction only (tau = 1/{batch_size:g})",
        }
        for found in self.alphas:
            rows.append((words[found.where], str(found.alpha), found.alpha.range_text))
            known = found.excess is not None and (found.excess_low > 0 or found.excess_high < 1)
            value = f"{found.excess:.1%}" if known else "not identified"
            ends = f"{found.excess_low:.1%} to {found.excess_high:.1%}" if known else "-"
            rows.append(("  excess error of alpha = 0.5", value, ends))
        return rows


@dataclass(frozen=True)
class MixtureWeight:
    """Weight of one estimator of mu in the best mix of several.

    Attributes:
        estimator: ``t``, ``t2`` or ``t4``: the mean of one, two or four traces; ``e``: the empty trace.
        weight: Its weight.
        low: Lower end.
        high: Upper end.
        identified: Whether these prompts identify it.
        error: Error of a step with this estimator alone.
    """

    estimator: str
    weight: float
    low: float
    high: float
    identified: bool
    error: float


@dataclass(frozen=True)
class Marginal:
    """Where mu came from and how far its weights can be trusted.

    Attributes:
        method: Estimator of the marginal gradient.
        rung: Step of the ladder that it stands on.
        reason: Why that one.
        estimable: Whether mu can be had; if not, nothing in the report is called alpha*.
        traces_per_answer: K, traces behind each answer (median).
        ess: Effective number of distinct traces (median over answers).
        largest_weight: Largest normalised weight (median over answers).
        anchor_gap: J, the Jeffreys divergence between posterior and proposal in nats (median over answers); ``J <= log
            K`` certifies.
        log_traces: log K.
        k_hat: Pareto tail index (median over answers); None where K < 25 is too few for a fit.
        k_threshold: What it must stay below.
        certified_share: Share of answers whose weights pass their tests; None where no test could be made.
        half_split: Unclipped alpha from one half of the traces less that from the other; its interval; do they agree?
        answers: Per answer: ``ess`` and ``anchor_gap``, for the figure.
        distinct: Distinct traces behind each answer (median).
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
    distinct: float | None = None


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
        layer_gain: What per-layer weights save over one weight for all, ``sum_l A_l (alpha_l - alpha)^2``.
        marginal: Where mu came from.
        warnings: What a reader must know before quoting a number.
        n_drawn_prompts: Prompts of the examples of ``n_second_draws``; None in a report of before they were counted.
        optimizer: eta L of an optimizer's steps, and alpha* there, where one was named.
        advice: What else the tokens of a step with the paper's 0.5 could buy; empty where mu is not estimable.
        tokens: Mean tokens of a D_t and of a D_e pair, its costs.
        sampler: Whether the policy is what drew the responses; None in a report of before it was asked.
        mixture: Weights of the best mix of the means of 1, 2 and 4 traces and the empty trace, at the same B; empty
            without second trace draws.
    """

    study: ClassVar[str] = "alpha-star"
    drawn_by: ClassVar[str | None] = "bvpo_stats.studies.alpha_star.figures"

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
    layer_gain: Interval | None
    marginal: Marginal
    warnings: list[str]
    n_drawn_prompts: int | None = field(default=None, kw_only=True)
    optimizer: OptimizerStep | None = None
    advice: list[Advice] = field(default_factory=list)
    tokens: dict[str, float] = field(default_factory=dict)
    mixture: list[MixtureWeight] = field(default_factory=list)
    sampler: SamplerRatio | None = None

    @classmethod
    def of(
        cls,
        summary: MomentSummary,
        marginal: Marginal,
        settings: AlphaSettings,
        *,
        adam: MomentSummary | None = None,
        halves: MomentSummary | None = None,
        drift: DriftBound | None = None,
        step: OptimizerStep | None = None,
        tokens: tuple[float, float] | None = None,
        warnings: Sequence[str] = (),
        **about: Any,
    ) -> AlphaReport:
        """Everything the report holds, from the moments of one run: pure arithmetic, no language model.

        Where mu is not estimable, no number that rests on it is formed: alpha*, the squared biases and the errors are
        None, and what remains is called by its own names (variances, ``alpha_var``, and ``alpha_range`` after a small
        drift).

        Args:
            summary: Moments of ``t``, ``e`` and, unless at the reference point, ``m``.
            marginal: Where mu came from.
            settings: Batch size, step size, level, method.
            adam: The same moments in Adam's metric, where an optimizer state was given.
            halves: Moments of ``t - e`` and of the difference of m from either half of the traces, where there are
                halves.
            drift: Bound on g_t's bias, where mu is not estimable and the drift is small.
            step: eta L of an optimizer's steps, where one was named; ``adam`` holds the moments in its metric.
            tokens: Mean tokens of a D_t and of a D_e pair, for advice.
            warnings: What the run noticed.
            **about: ``model``, ``template``, ``objective``, ``subset``, ``n_parameters``, ``n_second_draws``,
                ``n_drawn_prompts``, ``seed`` and ``curvature``.
        """
        known = marginal.estimable
        level: dict[str, Any] = {"level": settings.level}
        size: dict[str, Any] = {"batch_size": settings.batch_size, "eta_l": settings.eta_l, **level}
        if halves is not None:
            split = vars(half_split(summary, halves, **size))
            found = {name: finite(value) if isinstance(value, float) else value for name, value in split.items()}
            marginal = replace(marginal, half_split=found)
        # A few second draws say nothing of the trace-sampling part: no advice rests on them.
        enough = about.get("n_second_draws", 0) >= MIN_SECOND_DRAWS
        several = summary if enough else replace(summary, trace_sampling=None)
        values, spread = _tables(summary, settings, known)
        weights = _weights(summary, adam, settings, known)
        layers, gain = _layers_and_gain(summary, settings) if known else ([], None)
        share = None if summary.trace_sampling is None else Weight.of(trace_sampling_share(summary, **level))
        return cls(
            n_prompts=summary.n_prompts,
            n_examples=summary.n_examples,
            n_groups=summary.n_groups,
            **size,
            **weights,
            alpha_range=None if drift is None else alpha_range(summary, drift, **size),
            mse=values["mse"],
            bias_sq=values["bias_sq"],
            variance=values["variance"],
            trace_sampling_share=share,
            uncertainty=spread,
            curve=_curve(summary, settings) if known else [],
            parabola=_parabola(summary, settings) if known else {},
            verdict=_paper_verdict(summary, settings) if known else None,
            layers=layers,
            layer_gain=gain,
            marginal=marginal,
            warnings=[*warnings, *_warnings(summary, settings, marginal, weights["alpha_star"])],
            optimizer=step.with_alphas(summary if adam is None else adam, settings) if step and known else step,
            advice=_advice(several, settings, tokens) if known and tokens else [],
            tokens=dict(zip(("trace", "empty"), tokens, strict=True)) if tokens else {},
            mixture=_mixture(several, settings) if known and several.trace_sampling is not None else [],
            **about,
        )

    def present(self) -> Presentation:
        """The weights, errors, biases and variances, and the verdict in a sentence."""
        head = ("", "Estimate", f"{self.level:.0%} interval")
        heads = {_WEIGHTS: (*head, "Prompts (largest)")}
        mark: Mark = "plain" if self.alpha_star is not None and self.alpha_star.identified else "open"
        tables = (ResultTable(title, heads.get(title, head), tuple(rows)) for title, rows in self.sections().items())
        return Presentation(
            title="Which alpha?",
            findings=(Finding(self.answer, mark),),
            tables=tuple(tables),
            notes=tuple(self._notes()),
            cautions=tuple(self.warnings),
        )

    @property
    def answer(self) -> str:
        """The answer in a sentence or two."""
        where = f"At batch size {self.batch_size:g} and eta L = {self.eta_l:.3g}"
        star = self.alpha_star
        if star is None:
            alone = f"the variance alone is least at alpha_var = {self.alpha_var} ({self.alpha_var.range_text})."
            if self.alpha_range is None:
                return f"mu is not estimable from these traces, so there is no alpha*; {alone}"
            return f"{where}, {_range_words(self.alpha_range)}; {alone}"
        if not star.identified:
            return f"{where}, alpha* is not identified by {self.n_prompts} prompts: {star.range_text}."
        said = "" if self.verdict is None else " " + self.verdict.sentence.partition("alpha = ")[2]
        said = f" There, the paper's alpha ={said}" if said else ""
        return f"{where}, alpha* = {star} ({star.level:.0%} interval {star.range_text}).{said}"

    def sections(self) -> dict[str, list[Row]]:
        """Label, value and interval of every row of the table, by section."""
        found = {_WEIGHTS: self._weight_rows()}
        if self.alpha_star is not None:
            found["Error of one step"] = self._numbers("mse", _ERRORS)
            found["Bias"] = self._numbers("bias_sq", _BIASES)
        variances = self._numbers("variance", _VARIANCES)
        share = self.trace_sampling_share
        if share is not None:
            text = "-" if share.unclipped is None else f"{share.unclipped:.1%}"
            interval = f"{share.low:.1%} to {share.high:.1%}" if share.identified else "not identified"
            label, drawn = "  its share (Theorem 1)", self.n_drawn_prompts
            if drawn is not None:
                label += f", {drawn} of {self.n_prompts} prompts"
            if drawn == 1:  # it says nothing of the others
                text, interval, variances[1] = _NO_INTERVAL, "", (variances[1][0], _NO_INTERVAL, "")
            variances.insert(2, (label, text, interval))
        found["Variance of one example"] = variances
        found["Marginal gradient"] = _diagnostics(self.marginal)
        if self.optimizer is not None:
            found[f"In the metric of {self.optimizer.name}"] = self.optimizer.rows(self.batch_size)
        if self.mixture:
            found["Best mix of more traces, same batch"] = [
                (
                    _ESTIMATORS[one.estimator],
                    f"{one.weight:.3f}" if one.identified else "not identified",
                    f"{one.low:.3f} to {one.high:.3f}" if one.identified else "-",
                )
                for one in self.mixture
            ]
        if self.advice:
            title = f"What would help most, for the tokens of alpha = {PAPER_ALPHA:g} (change of its error)"
            found[title] = [_advice_row(one) for one in self.advice]
        return found

    def _weight_rows(self) -> list[Row]:
        named: list[tuple[str, Weight | None]] = [
            (f"alpha* at B = {self.batch_size:g}, eta L = {self.eta_l:.3g}", self.alpha_star),
            ("alpha_J, nothing dropped (eta L < 1)", self.alpha_j),
            ("alpha* in Adam's metric", self.alpha_adam),
            ("alpha for direction only", self.alpha_direction),
            ("bias-only limit (large batches)", self.alpha_bias),
            ("alpha_var, variance-only limit", self.alpha_var),
        ]
        rows: list[Row] = [
            (name, str(weight), weight.range_text, weight.reach_text) for name, weight in named if weight is not None
        ]
        found = self.alpha_range
        if found is not None:
            label = f"range of alpha* at B = {self.batch_size:g}, eta L = {self.eta_l:.3g}"
            rows.insert(0, (label, "no estimate", f"{found.low:.3f} to {found.high:.3f}", "-"))
        return rows

    def _advice_words(self) -> str:
        """Costs, what helps most, and whether a second trace beats the mix."""
        costs = f"A D_t pair costs {self.tokens['trace']:.0f} tokens, a D_e pair {self.tokens['empty']:.0f}"
        equal = [one for one in self.advice if one.progress == 1 and one.helps == "yes"]
        best = min(equal, key=lambda one: one.error, default=None)
        most = "nothing is sure to help" if best is None else f"{CHOICES[best.choice]} helps most"
        by_name = {one.choice: one for one in self.advice}
        second = by_name.get("two_traces")
        versus = ""
        if second is not None:
            mix = by_name["mix"]
            clear = None not in (second.high, mix.low) and second.high < mix.low  # type: ignore[operator]
            worse = None not in (second.low, mix.high) and second.low > mix.high  # type: ignore[operator]
            said = "beats" if clear else "does not beat" if worse else "may or may not beat"
            versus = f" A second trace per answer, without D_e, {said} the mix at alpha*."
        return (
            f"{costs}. For the tokens of a step of the paper's mix {most}; choices that halve the way (learning rate "
            f"times steps) are not counted there.{versus}"
        )

    def _numbers(self, part: str, labels: dict[str, str]) -> list[Row]:
        values: dict[str, float | None] = getattr(self, part)
        rows: list[Row] = []
        for name, label in labels.items():
            value, spread = values.get(name), self.uncertainty[part].get(name)
            if value is None:
                continue
            rows.append((label, number(value), self._interval_words(part, name, spread)))
        return rows

    def _interval_words(self, part: str, name: str, spread: Uncertainty | None) -> str:
        if part == "bias_sq" and name != "empty" and self.marginal.rung == "reference point":
            return _AT_REFERENCE
        if spread is None:
            return "-"
        if spread.low is None or spread.high is None:
            return _NO_INTERVAL
        return f"{number(spread.low)} to {number(spread.high)}"

    def _notes(self) -> list[str]:
        """What the numbers are."""
        loss = ", ".join(f"{name} {value}" for name, value in self.objective.items())
        alone = self.n_groups == self.n_prompts
        left_out = "leave-one-prompt-out jackknife"
        jackknife = left_out if alone else f"delete-a-group jackknife with {self.n_groups} groups"
        lines = [
            f"Model {self.model}, template {self.template}; {loss}; theta: {self.subset}, {self.n_parameters:,} "
            "parameters.",
            f"{self.n_prompts} prompts, {self.n_examples} examples, seed {self.seed}. Intervals: {self.level:.0%}, "
            f"{jackknife}, sets by Fieller and Hall for weights, longer where larger prompts would move them.",
            "The error of a step is norm(bias)^2 + (eta L / B) Var; of mixing weights, alpha multiplies g_t.",
            f"mu: {self.marginal.reason}",
            *([] if self.sampler is None else [self.sampler.words]),
        ]
        if 0 < self.n_second_draws < self.n_examples:
            of = "" if self.n_drawn_prompts is None else f" ({self.n_drawn_prompts} of {self.n_prompts} prompts)"
            lines.append(
                f"The trace-sampling part rests on the {self.n_second_draws} of {self.n_examples} examples{of} of "
                "which both answers came up again among the samples. Their second traces are exact draws, but their "
                "answers are likelier than the others'."
            )
        if self.optimizer is not None:
            step = self.optimizer
            lines.append(
                f"eta L = eta tr(P H P Sigma) / tr(P Sigma) of {step.name}, P {step.metric}; Sigma = Cov(g_t - g_e), H "
                f"Gauss-Newton's of {step.n_pairs} D_t pairs, none along its own noise (which would inflate it). "
                "The excess error of 0.5 is the share of its error that alpha* saves."
            )
        if self.advice:
            lines.append(self._advice_words())
        if self.curvature is not None:
            words = {key: f"{x:.4g}" if isinstance(x, float) else str(x) for key, x in self.curvature.items()}
            parts = ", ".join(f"{key.replace('_', ' ')} {word}" for key, word in words.items())
            lines.append(f"eta L was measured: {parts}.")
        if self.layer_gain is not None and self.layer_gain.value is not None:
            gain = self.layer_gain
            open_ = gain.low is None or gain.low <= 0
            lines.append(
                f"One alpha per layer instead of one for all would save {number(gain.value)} "
                f"({number(gain.low)} to {number(gain.high)}) of the error"
                + (": these prompts do not tell that from nothing." if open_ else ".")
            )
        return lines


_ESTIMATORS = {"t": "one trace", "t2": "mean of two traces", "t4": "mean of four traces", "e": "empty trace"}


def _advice_row(one: Advice) -> Row:
    """A choice, the change of the error, its interval."""
    label = CHOICES[one.choice]
    if one.choice in ("mix", "two_traces_mix"):
        label += f" (alpha = {one.alpha:.2f})"
    if one.progress == 1:
        label += f", B = {one.batch_size:.3g}"
    else:
        label += f" ({one.progress:g} of the way)"
    ends = None if one.low is None or one.high is None else f"{one.low:+.0%} to {one.high:+.0%}"
    return label, f"{one.change:+.0%}" if ends else "-", ends or "not identified"


def _advice(summary: MomentSummary, settings: AlphaSettings, tokens: tuple[float, float]) -> list[Advice]:
    return budget_advice(
        summary,
        trace_tokens=tokens[0],
        empty_tokens=tokens[1],
        alpha=PAPER_ALPHA,
        batch_size=settings.batch_size,
        eta_l=settings.eta_l,
        level=settings.level,
    )


def _mixture(summary: MomentSummary, settings: AlphaSettings) -> list[MixtureWeight]:
    found = trace_mixture(summary, batch_size=settings.batch_size, eta_l=settings.eta_l, level=settings.level)
    return [
        MixtureWeight(name, one.value, one.low, one.high, one.identified, float(found.alone[name].value))
        for name, one in found.weights.items()
    ]


def _weights(
    summary: MomentSummary, adam: MomentSummary | None, settings: AlphaSettings, known: bool
) -> dict[str, Any]:
    """Every mixing weight of the report by its name there; all but ``alpha_var`` need mu."""
    how: dict[str, Any] = {"level": settings.level}
    limits = alpha_limits(summary, **how)
    names = ("alpha_star", "alpha_bias", "alpha_j", "alpha_adam", "alpha_direction")
    weights: dict[str, Any] = {"alpha_var": Weight.of(limits.variance_only), **dict.fromkeys(names)}
    if not known:
        return weights
    how["batch_size"] = settings.batch_size
    step = {**how, "eta_l": settings.eta_l}
    if settings.eta_l < 1:  # at eta L = 1 it is alpha*
        weights["alpha_j"] = Weight.of(alpha_j(summary, settings.eta_l, **how))
    if adam is not None:
        weights["alpha_adam"] = Weight.of(alpha_from_summary(adam, **step))
    bias = Weight.of(limits.bias_only)
    if summary.reference_point:  # P0 and Q0 are both norm(b_e)^2
        bias = replace(
            bias, value=1.0, low=1.0, high=1.0, unclipped=1.0, identified=True, unclipped_low=1.0,
            unclipped_high=1.0, n_eff=None, largest_share=None, prompts_needed=None, needed_is_bound=False,
            identity=_AT_REFERENCE,
        )  # fmt: skip
    return weights | {
        "alpha_star": Weight.of(alpha_from_summary(summary, **step)),
        "alpha_bias": bias,
        "alpha_direction": Weight.of(direction_alpha(summary, **how)),
    }


def curve_batch_sizes(n_prompts: int, batch_size: float) -> list[float]:
    """Powers of two up to eight times the larger of the two numbers, with both of them.

    Where the curve goes from the batch size in use on is what it is drawn for.

    >>> curve_batch_sizes(6, 8)
    [1.0, 2.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0]
    """
    top = 8 * max(n_prompts, batch_size)
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


def _curve(summary: MomentSummary, settings: AlphaSettings) -> list[CurvePoint]:
    """alpha* over batch sizes at the given eta L, and at 1, the edge of Theorem 3's condition."""
    sizes = curve_batch_sizes(summary.n_prompts, settings.batch_size)
    points = []
    for eta_l in sorted({settings.eta_l, 1.0}):
        curve = alpha_curve(summary, sizes, eta_l=eta_l, level=settings.level)
        columns = (curve.batch_size, curve.alpha, curve.low, curve.high, curve.identified, curve.n_eff, curve.largest)
        points += [
            CurvePoint(float(size), eta_l, finite(alpha), float(low), float(high), bool(known), *map(finite, tails))
            for size, alpha, low, high, known, *tails in zip(*columns, strict=True)
        ]
    return points


def _parabola(summary: MomentSummary, settings: AlphaSettings) -> dict[str, list[float]]:
    """The error of a step over alpha, with its band."""
    alphas = np.linspace(0, 1, _PARABOLA_POINTS)
    tau = noise_scale(settings.batch_size, settings.eta_l)
    band = error_curve(summary, alphas, tau=tau, level=settings.level)
    columns = {"alpha": alphas, "value": band.value, "low": band.low, "high": band.high}
    return {name: [float(x) for x in column] for name, column in columns.items()}


def _paper_verdict(summary: MomentSummary, settings: AlphaSettings) -> Verdict:
    """Whether the paper's alpha beats both of its parts."""
    verdict = fixed_alpha_verdict(
        summary,
        PAPER_ALPHA,
        batch_size=settings.batch_size,
        eta_l=settings.eta_l,
        level=settings.level,
    )
    return Verdict(
        alpha=verdict.alpha,
        beats_trace=verdict.beats_trace,
        beats_empty=verdict.beats_empty,
        window_low=finite(verdict.window_low),
        window_high=finite(verdict.window_high),
        sentence=verdict.sentence,
    )


def _layers_and_gain(summary: MomentSummary, settings: AlphaSettings) -> tuple[list[Layer], Interval | None]:
    """Weights of the blocks; blocks that never get a gradient (LoRA's A at its start) are left out."""
    if len(summary.blocks) < 2:
        return [], None
    found = layer_alphas(
        summary,
        batch_size=settings.batch_size,
        eta_l=settings.eta_l,
        level=settings.level,
    )
    layers = [
        Layer(
            block=name,
            alpha=finite(alpha.value),
            low=alpha.low,
            high=alpha.high,
            identified=alpha.identified,
            n_eff=finite(alpha.n_eff),
            largest_share=finite(alpha.largest),
            curvature=finite(found.weights[name]),
        )
        for name, alpha in found.alphas.items()
        if np.isfinite(alpha.value)
    ]
    gain = found.gain
    if gain is None:
        return layers, None
    return layers, Interval(*(finite(float(x)) for x in (gain.value, gain.low, gain.high)))


def _warnings(summary: MomentSummary, settings: AlphaSettings, marginal: Marginal, star: Weight | None) -> list[str]:
    found = few_cautions(summary.n_prompts)
    if not marginal.estimable:
        found.append(
            f"mu is not estimable ({marginal.reason}); there is no alpha* here. alpha_var is the weight that minimises "
            "variance alone."
        )
    elif star is not None and not star.identified:
        found.append(f"alpha* is not identified at {summary.n_prompts} prompts: {star.range_text}.")
    if star is not None and star.value is not None:
        parts = estimates(summary)
        error = parts.error(star.value, noise_scale(settings.batch_size, settings.eta_l))
        more = _interval(error - parts.marginal_sq, summary, settings.level)
        if more.low > 0:
            found.append(
                "The zero vector has less error than any mix: at this batch size noise outweighs the signal. Mean "
                "squared error rewards small vectors; raise the batch size before you compare directions."
            )
        elif more.value > 0:
            found.append(
                "The zero vector is not told apart from the best mix: at this batch size noise is about as large as "
                f"the signal (the mix has {more.value:.3g} more error, {more.low:.3g} to {more.high:.3g}). Raise the "
                "batch size before you compare directions."
            )
    if marginal.half_split is not None and not marginal.half_split["agrees"]:
        found.append(
            "The two halves of the traces give different alphas: mu depends on which traces were drawn. Look at the "
            "effective sizes, and make a bank with more traces."
        )
    return found


def _range_words(found: AlphaRange) -> str:
    """Where alpha* may lie after a small drift, and why there is no more to say."""
    why = (
        f"mu is not estimable from these traces, but log-ratios to theta_ref of at most "
        f"{found.largest_log_ratio:.2g} nats bound the bias of g_t"
    )
    if found.informative:
        return f"alpha* lies between {found.low:.3f} and {found.high:.3f} ({found.level:.0%} confidence): {why}"
    return f"alpha* may lie anywhere in [0, 1]: {why}, though not closely enough"


def _diagnostics(m: Marginal) -> list[Row]:
    rows: list[Row] = [("method", m.method, "" if m.rung is None else f"rung: {m.rung}")]
    if m.traces_per_answer is not None:
        rows.append(("traces per answer, K (median)", f"{m.traces_per_answer:g}", ""))
    if m.ess is not None:
        rows.append(("effective traces (median)", f"{m.ess:.2f}", ""))
    if m.largest_weight is not None:
        rows.append(("largest weight (median)", f"{m.largest_weight:.2f}", ""))
    if m.anchor_gap is not None and m.log_traces is not None:
        rows.append(("anchor gap J (median, nats)", f"{m.anchor_gap:.2f}", f"log K = {m.log_traces:.2f}"))
    if m.k_hat is not None and m.k_threshold is not None:
        rows.append(("Pareto k-hat (median)", f"{m.k_hat:.2f}", f"certified below {m.k_threshold:.2f}"))
    elif m.k_threshold is not None:
        rows.append(("Pareto k-hat", "-", "needs 25 traces or more"))
    if m.certified_share is not None:
        rows.append(("answers with certified weights", f"{m.certified_share:.0%}", ""))
    if m.half_split is not None:
        split = m.half_split
        agrees = "the halves agree" if split["agrees"] else "the halves DISAGREE"
        interval = f"{number(split['low'])} to {number(split['high'])}: {agrees}"
        rows.append(("alpha_unc, one half of the traces less the other", number(split["difference"]), interval))
    return rows
