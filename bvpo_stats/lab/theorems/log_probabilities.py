"""Appendix B takes the variance of log-probabilities for that of gradients: how well does one stand for the other?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bvpo_stats.embedded.assets import embedded_prompts
from bvpo_stats.lab.oracle import Oracle
from bvpo_stats.lab.theorems.convergence import TIGHT
from bvpo_stats.lab.theorems.ground import COOL, Ground
from bvpo_stats.lab.theorems.report import STANDARD_ERRORS, Check, Numbers, TopicReport, Verdict, judge
from bvpo_stats.model.batching import TokenSequence, collate
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy
from bvpo_stats.model.scores import score_pass
from bvpo_stats.model.sinks import Dots
from bvpo_stats.records import MODES, Completion, Mode
from bvpo_stats.sampling.engines.base import SamplingOptions
from bvpo_stats.sampling.sample import SAMPLES_FILE
from bvpo_stats.statistics.proportions import jackknife_interval
from bvpo_stats.statistics.tails import tail_interval
from bvpo_stats.store.tables import read_records
from bvpo_stats.studies.alpha_star.run import prepare_subset
from bvpo_stats.studies.variance.run import sample_both_modes

Array = NDArray[np.float64]
SAMPLES = 5
"""Responses per question and mode, as in Appendix B."""
COLUMNS = ("logp_thinking", "logp_nothinking", "gradient_thinking", "gradient_nothinking")
"""Variances of one question: of log p (nats^2) and of the score, tr Cov."""
_DRAWN = 4_000


def appendix_b(ground: Ground) -> TopicReport:
    """Log-probability variance against gradient variance, exact on oracles and measured on the embedded model.

    Args:
        ground: Oracles and settings.
    """
    oracles = [ground.build(temperature=COOL, seed=ground.config.seed + n, max_trace=2, n_prompts=2) for n in range(12)]
    exact = np.concatenate([question_variances(oracle) for oracle in oracles])
    checks = [_estimated(oracles[0], ground), *_stands_for(exact)]
    data = {"oracle": _listed(exact), "oracle_ratios": _ratios(exact), "columns": list(COLUMNS)}
    if ground.config.embedded_prompts:
        measured = embedded_variances(ground.config.embedded_prompts, ground.config.seed)
        checks.append(_embedded(measured))
        data |= {"embedded": _listed(measured), "embedded_ratios": _ratios(measured)}
    return TopicReport(
        name="appendix_b",
        title="Appendix B: does the variance of log p stand for that of the gradient?",
        checks=tuple(checks),
        data=data,
    )


def question_variances(oracle: Oracle) -> Array:
    """Exact :data:`COLUMNS` of every prompt: responses of the sampling model, log p and scores of the policy.

    Args:
        oracle: The oracle, in any coordinates.
    """
    table, rows = oracle.table, []
    for x in range(oracle.grammar.n_prompts):
        row = []
        for law, logp, scores in (
            (table.sampling.joint[x], table.policy.joint[x], table.scores[x]),
            (table.sampling.answer[x, 0], table.policy.answer[x, 0], table.scores[x, 0]),
        ):
            p, flat = np.exp(law).ravel(), scores.reshape(-1, scores.shape[-1])
            row.append((p @ (logp.ravel() - p @ logp.ravel()) ** 2, p @ np.sum((flat - p @ flat) ** 2, axis=1)))
        (logp_t, gradient_t), (logp_e, gradient_e) = row
        rows.append((logp_t, logp_e, gradient_t, gradient_e))
    return np.array(rows)


def embedded_variances(n_prompts: int, seed: int) -> Array:
    """The same of the embedded model, from five responses per question and mode at temperature 0.8.

    Variances are unbiased (n - 1); scores are those of a fresh LoRA adapter, as ``alpha-star`` uses it.

    Args:
        n_prompts: Questions.
        seed: Decides the responses.
    """
    policy, prompts = load_policy(PolicyOptions(model="embedded")), embedded_prompts(n_prompts)
    with TemporaryDirectory() as folder:
        path = Path(folder) / SAMPLES_FILE
        options = SamplingOptions(samples=SAMPLES, temperature=COOL, top_p=1.0, max_new_tokens=256, seed=seed)
        sample_both_modes(policy, prompts, options, path)
        responses = [response for response in read_records(path, Completion) if response.complete]
    return np.array(list(_measured(policy, responses)))


def _measured(policy: Policy, responses: list[Completion]) -> Iterator[tuple[float, float, float, float]]:
    policy, subset, _ = prepare_subset(policy)
    questions: dict[str, dict[Mode, list[Completion]]] = {}
    for response in responses:
        questions.setdefault(response.prompt_id, {mode: [] for mode in MODES})[response.mode].append(response)
    for modes in questions.values():
        if min(len(some) for some in modes.values()) < 2:
            continue
        found = []
        for mode in MODES:
            dots = Dots()
            sequences = [TokenSequence(tuple(r.prompt_ids), tuple(r.completion_ids)) for r in modes[mode]]
            batch = collate(sequences, device=policy.device)
            logps = score_pass(policy.model, subset, batch, [dots]).sum(dim=1).double().numpy()
            gram, n = dots.gram.numpy(), len(sequences)
            found.append((float(logps.var(ddof=1)), float(np.trace(gram) - gram.sum() / n) / (n - 1)))
        (logp_t, gradient_t), (logp_e, gradient_e) = found
        yield logp_t, logp_e, gradient_t, gradient_e


def _ratios(variances: Array) -> dict[str, dict[str, Any]]:
    """Thinking / NoThinking of the averages over questions, with the 95% intervals that `variance` has."""
    return {
        "logp": vars(tail_interval(variances[:, 0], variances[:, 1])),
        "gradient": vars(tail_interval(variances[:, 2], variances[:, 3])),
    }


def _estimated(oracle: Oracle, ground: Ground) -> Check:
    """The ratio from five drawn responses per question against the exact one."""
    rng, table, exact = ground.rng(6), oracle.table, question_variances(oracle)
    prompts = rng.integers(oracle.grammar.n_prompts, size=_DRAWN)
    features = []
    with_trace = (table.sampling.joint, table.policy.joint)
    without = (table.sampling.answer[:, 0], table.policy.answer[:, 0])
    for law, logp in (with_trace, without):
        drawn = np.empty((_DRAWN, SAMPLES))
        for x in range(oracle.grammar.n_prompts):
            rows = np.flatnonzero(prompts == x)
            p = np.exp(law[x]).ravel()
            drawn[rows] = logp[x].ravel()[rng.choice(len(p), size=(len(rows), SAMPLES), p=p / p.sum())]
        features.append(drawn.var(axis=1, ddof=1))
    found = jackknife_interval(np.stack(features, axis=1), lambda v: v[..., 0] / v[..., 1], level=0.6826894921)
    assert found.value is not None  # variances are positive
    assert found.high is not None
    return judge(
        "Five responses per question estimate the variance ratio of log p.",
        Numbers(
            "variance ratio (log p), Thinking / NoThinking",
            found.value,
            float(exact[:, 0].mean() / exact[:, 1].mean()),
            STANDARD_ERRORS * (found.high - found.value),
        ),
        "Appendix B, Table 3",
        note=f"{_DRAWN} questions drawn from an oracle.",
    )


def _stands_for(exact: Array) -> tuple[Check, ...]:
    """Direction, size and order of the two variances over the oracles' prompts, all exact."""
    logp, gradient = exact[:, 0] / exact[:, 1], exact[:, 2] / exact[:, 3]
    agree = float(np.mean((logp > 1) == (gradient > 1)))
    overall = (exact[:, 2].mean() / exact[:, 3].mean(), exact[:, 0].mean() / exact[:, 1].mean())
    order = float(stats.spearmanr(logp, gradient).statistic)
    factor = max(np.max(gradient / logp), np.max(logp / gradient))
    return (
        judge(
            "Where traces raise the variance of log p, they raise that of the gradient.",
            Numbers(f"share of {len(exact)} prompts that agree", agree, 1.0, 0.1, ">="),
            "Appendix B, conclusion",
            verdict=_tightness(*overall),
            should_hold=False,
            note=f"Exact, on 12 oracles: ratio {overall[1]:.2f} for log p, {overall[0]:.2f} for the score.",
        ),
        judge(
            "A larger ratio for log p means a larger ratio for the gradient.",
            Numbers("rank correlation over prompts", order, 0.5, 0.0, ">="),
            "Appendix B, as a measure of gradient variance",
            should_hold=False,
            note=f"Prompt by prompt the two ratios differ by up to a factor of {factor:.0f}. alpha-star measures "
            "the gradients themselves.",
        ),
    )


def _embedded(measured: Array) -> Check:
    ratios = _ratios(measured)
    logp, gradient = ratios["logp"], ratios["gradient"]
    values = [gradient["value"], gradient["low"], gradient["high"], logp["value"], logp["low"], logp["high"]]
    value, low, high, logp_value, logp_low, logp_high = (float("nan") if v is None else v for v in values)
    return judge(
        "On the embedded model traces raise the variance of the gradient, as that of log p suggests.",
        Numbers("tr Cov(score) ratio, Thinking / NoThinking, lower 95% limit", low, 1.0, 0.0, ">="),
        "Appendix B, measured",
        verdict=_tightness(value, logp_value),
        should_hold=False,
        note=f"{len(measured)} questions: score {value:.2f} ({low:.2f} to {high:.2f}), log p {logp_value:.2f} "
        f"({logp_low:.2f} to {logp_high:.2f}).",
    )


def _listed(variances: Array) -> list[dict[str, float]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in variances.tolist()]


def _tightness(value: float, proxy: float) -> Verdict:
    return "holds" if max(value / proxy, proxy / value) <= TIGHT else "loose"
