"""The alpha-star report for people: its tables, and the verdict in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

from bvpo_stats.statistics.bounds import AlphaRange
from bvpo_stats.studies.alpha_star.entries import Weight
from bvpo_stats.studies.alpha_star.report import AlphaReport
from bvpo_stats.studies.base import Finding, Mark, Presentation, ResultTable, number

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


@dataclass(frozen=True)
class _Row:
    label: str
    value: str
    interval: str


@dataclass(frozen=True)
class _Section:
    title: str
    rows: list[_Row]


def verdict(report: AlphaReport) -> str:
    """The answer in a sentence or two."""
    where = f"At batch size {report.batch_size:g} and eta L = {report.eta_l:.3g}"
    star = report.alpha_star
    if star is None:
        alone = f"the variance alone is least at alpha_var = {report.alpha_var} ({report.alpha_var.range_text})."
        if report.alpha_range is None:
            return f"mu is not estimable from these traces, so there is no alpha*; {alone}"
        return f"{where}, {_range_words(report.alpha_range)}; {alone}"
    if not star.identified:
        return f"{where}, alpha* is not identified by {report.n_prompts} prompts: {star.range_text}."
    said = "" if report.verdict is None else " " + report.verdict.sentence.partition("alpha = ")[2]
    said = f" There, the paper's alpha ={said}" if said else ""
    return f"{where}, alpha* = {star} ({star.level:.0%} interval {star.range_text}).{said}"


def _range_words(found: AlphaRange) -> str:
    """Where alpha* may lie after a small drift, and why there is no more to say."""
    why = (
        f"mu is not estimable from these traces, but log-ratios to theta_ref of at most "
        f"{found.largest_log_ratio:.2g} nats bound the bias of g_t"
    )
    if found.informative:
        return f"alpha* lies between {found.low:.3f} and {found.high:.3f} ({found.level:.0%} confidence): {why}"
    return f"alpha* may lie anywhere in [0, 1]: {why}, though not closely enough"


def sections(report: AlphaReport) -> list[_Section]:
    """The rows of the table, by section."""
    found = [_Section("Mixing weight", _weights(report))]
    if report.alpha_star is not None:
        found.append(_Section("Error of one step", _numbers(report, "mse", _ERRORS)))
        found.append(_Section("Bias", _numbers(report, "bias_sq", _BIASES)))
    variances = _numbers(report, "variance", _VARIANCES)
    share = report.trace_sampling_share
    if share is not None:
        text = "-" if share.unclipped is None else f"{share.unclipped:.1%}"
        variances.insert(2, _Row("  its share (Theorem 1)", text, _percent(share)))
    found.append(_Section("Variance of one example", variances))
    found.append(_Section("Marginal gradient", _diagnostics(report)))
    return found


def _weights(report: AlphaReport) -> list[_Row]:
    named: list[tuple[str, Weight | None]] = [
        (f"alpha* at B = {report.batch_size:g}, eta L = {report.eta_l:.3g}", report.alpha_star),
        ("alpha_J, nothing dropped (eta L < 1)", report.alpha_j),
        ("alpha* in Adam's metric", report.alpha_adam),
        ("alpha for direction only", report.alpha_direction),
        ("bias-only limit (large batches)", report.alpha_bias),
        ("alpha_var, variance-only limit", report.alpha_var),
    ]
    rows = [_Row(name, str(weight), weight.range_text) for name, weight in named if weight is not None]
    found = report.alpha_range
    if found is not None:
        label = f"range of alpha* at B = {report.batch_size:g}, eta L = {report.eta_l:.3g}"
        rows.insert(0, _Row(label, "no estimate", f"{found.low:.3f} to {found.high:.3f}"))
    return rows


def _numbers(report: AlphaReport, part: str, labels: dict[str, str]) -> list[_Row]:
    values: dict[str, float | None] = getattr(report, part)
    rows = []
    for name, label in labels.items():
        value, spread = values.get(name), report.uncertainty[part].get(name)
        if value is None:
            continue
        interval = "-" if spread is None else f"{number(spread.low)} to {number(spread.high)}"
        rows.append(_Row(label, number(value), interval))
    return rows


def _diagnostics(report: AlphaReport) -> list[_Row]:
    m = report.marginal
    rows = [_Row("method", m.method, "" if m.rung is None else f"rung: {m.rung}")]
    if m.traces_per_answer is not None:
        rows.append(_Row("traces per answer, K (median)", f"{m.traces_per_answer:g}", ""))
    if m.ess is not None:
        rows.append(_Row("effective traces (median)", f"{m.ess:.2f}", ""))
    if m.largest_weight is not None:
        rows.append(_Row("largest weight (median)", f"{m.largest_weight:.2f}", ""))
    if m.anchor_gap is not None and m.log_traces is not None:
        rows.append(_Row("anchor gap J (median, nats)", f"{m.anchor_gap:.2f}", f"log K = {m.log_traces:.2f}"))
    if m.k_hat is not None and m.k_threshold is not None:
        rows.append(_Row("Pareto k-hat (median)", f"{m.k_hat:.2f}", f"certified below {m.k_threshold:.2f}"))
    elif m.k_threshold is not None:
        rows.append(_Row("Pareto k-hat", "-", "needs 25 traces or more"))
    if m.certified_share is not None:
        rows.append(_Row("answers with certified weights", f"{m.certified_share:.0%}", ""))
    if m.half_split is not None:
        split = m.half_split
        agrees = "the halves agree" if split["agrees"] else "the halves DISAGREE"
        interval = f"{number(split['low'])} to {number(split['high'])}: {agrees}"
        rows.append(_Row("alpha_unc, one half of the traces less the other", number(split["difference"]), interval))
    return rows


def notes(report: AlphaReport) -> list[str]:
    """What the numbers are."""
    loss = ", ".join(f"{name} {value}" for name, value in report.objective.items())
    alone = report.n_groups == report.n_prompts
    jackknife = "leave-one-prompt-out jackknife" if alone else f"delete-a-group jackknife with {report.n_groups} groups"
    lines = [
        f"Model {report.model}, template {report.template}; {loss}; theta: {report.subset}, {report.n_parameters:,} "
        "parameters.",
        f"{report.n_prompts} prompts, {report.n_examples} examples, seed {report.seed}. Intervals: {report.level:.0%}, "
        f"{jackknife}, Fieller sets for weights.",
        "The error of a step is norm(bias)^2 + (eta L / B) Var; of mixing weights, alpha multiplies g_t.",
        f"mu: {report.marginal.reason}",
    ]
    if 0 < report.n_second_draws < report.n_examples:
        lines.append(
            f"The trace-sampling part rests on the {report.n_second_draws} of {report.n_examples} examples of which "
            "both answers came up again among the samples. Their second traces are exact draws, but their answers are "
            "likelier than the others'."
        )
    if report.curvature is not None:
        parts = ", ".join(f"{key.replace('_', ' ')} {_value(value)}" for key, value in report.curvature.items())
        lines.append(f"eta L was measured: {parts}.")
    if report.layer_gain is not None and report.layer_gain.value is not None:
        gain = report.layer_gain
        lines.append(
            f"One alpha per layer instead of one for all would save {number(gain.value)} "
            f"({number(gain.low)} to {number(gain.high)}) of the error."
        )
    return lines


def present(report: AlphaReport) -> Presentation:
    """An alpha-star report as people see it."""
    head = ("", "Estimate", f"{report.level:.0%} interval")
    tables = (
        ResultTable(section.title, head, tuple((row.label, row.value, row.interval) for row in section.rows))
        for section in sections(report)
    )
    identified = report.alpha_star is not None and report.alpha_star.identified
    mark: Mark = "plain" if identified else "open"
    return Presentation(
        title="Which alpha?",
        findings=(Finding(verdict(report), mark),),
        tables=tuple(tables),
        notes=tuple(notes(report)),
        cautions=tuple(report.warnings),
    )


def _percent(share: Weight) -> str:
    return f"{share.low:.1%} to {share.high:.1%}" if share.identified else "-"


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
