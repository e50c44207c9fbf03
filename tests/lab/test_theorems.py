"""The theorems study: every claim that should hold does, and an injected error makes its check fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.lab.acceptance.cells import v_statistics
from bvpo_stats.lab.theorems import (
    Ground,
    TheoremConfig,
    alpha,
    bias,
    convergence,
    log_probabilities,
    report,
    variance,
)
from bvpo_stats.lab.theorems import run as theorems_run
from tests.cli.running import failed_politely, run
from tests.golden.cases import Runs

OPTIONS = ("--embedded-prompts", 0, "--draws", 4096)


@pytest.fixture(scope="module")
def ground() -> Ground:
    return Ground(TheoremConfig(draws=4096, embedded_prompts=0))


@pytest.mark.slow
def test_every_claim_that_should_hold_does(golden: Runs) -> None:
    written = json.loads((golden.output("theorems") / "report.json").read_text())
    assert written["study"] == "theorems"
    assert [topic["name"] for topic in written["topics"]] == [
        *("theorem1", "theorem2", "proposition1", "batch_size", "theorem3", "theorem4"),
        *("reference_point", "drift", "marginal_gradient", "appendix_b"),
    ]
    found = [check for topic in written["topics"] for check in topic["checks"]]
    assert written["alarms"] == []
    assert report.TheoremsReport.from_dict(written).to_dict() == written
    assert len(found) == written["n_checks"] > 35
    for check in found:
        assert all(check[key] for key in ("claim", "source", "quantity"))
        assert check["verdict"] in ("holds", "holds with limits", "loose", "fails")
        assert np.isfinite([check["measured"], check["exact"], check["tolerance"]]).all()
    # What the study is for: sentences that do not hold as worded are named.
    strong = {check["claim"] for check in found if check["verdict"] == "fails"}
    assert any("nontrivial mixture" in claim for claim in strong)
    assert any("temperature, 0.8" in claim for claim in strong)


@pytest.mark.slow
def test_table_and_files_of_the_command(golden: Runs) -> None:
    folder, printed = golden.output("theorems"), golden.printed("theorems")
    for words in ("Do the theorems hold?", "holds with", "claims that should hold do", "too strong as worded"):
        assert words in printed
    text = (folder / "report.md").read_text()
    assert text.count("](figures/") == len(list((folder / "figures").glob("*.png"))) == 10
    assert "Theorem 3, equation (4)" in text


def test_a_seed_decides_everything() -> None:
    config = TheoremConfig(draws=2048, embedded_prompts=0)
    assert alpha.theorem2(Ground(config)) == alpha.theorem2(Ground(config))


def alarms(topic: report.TopicReport) -> str:
    return " ".join(check.claim for check in topic.alarms)


def test_a_v_statistic_fails_and_the_command_says_so(monkeypatch, tmp_path: Path) -> None:
    honest = alpha.summary_of_arrays
    monkeypatch.setattr(alpha, "summary_of_arrays", lambda *a, **k: v_statistics(honest(*a, **k)))
    monkeypatch.setattr(theorems_run, "TOPICS", (alpha.theorem2,))
    result = run("theorems", *OPTIONS, "--output", tmp_path / "o")
    assert result.returncode == 1
    assert "that should hold do not" in result.stdout
    written = json.loads((tmp_path / "o" / "report.json").read_text())
    assert any("unbiased at N = 20" in claim for claim in written["alarms"])


def test_a_wrong_alpha_fails_and_the_command_says_so(monkeypatch, tmp_path: Path) -> None:
    honest = alpha.alpha_from_summary

    def wrong(summary):
        found = honest(summary)
        return replace(found, unclipped=1 - found.unclipped)  # the weights of g_t and g_e exchanged

    monkeypatch.setattr(alpha, "alpha_from_summary", wrong)
    monkeypatch.setattr(theorems_run, "TOPICS", (alpha.theorem2,))
    assert run("theorems", *OPTIONS, "--output", tmp_path / "o").returncode == 1


def test_theorem_1_notices_traces_that_were_not_drawn_again(monkeypatch, ground) -> None:
    honest = variance.summary_of_arrays

    def same_traces(members, trace2=None):
        return honest(members, trace2=None if trace2 is None else 0.9 * trace2 + 0.1 * members["t"])

    monkeypatch.setattr(variance, "summary_of_arrays", same_traces)
    assert "Averaged over the data" in alarms(variance.theorem1(ground))


def test_batch_scaling_notices_an_alpha_without_batch_size(monkeypatch, ground) -> None:
    exact = ground.exact
    honest = type(exact).alpha
    monkeypatch.setattr(type(exact), "alpha", lambda self, tau: honest(self, tau**0.5))
    assert "At batch size B" in alarms(alpha.batch_scaling(ground))


def test_theorem_3_notices_a_bound_without_its_descent_term(monkeypatch, ground) -> None:
    monkeypatch.setattr(convergence, "STEPS", 3)
    monkeypatch.setattr(convergence, "PATHS", 2)
    honest = convergence.bound_terms

    def without_descent(path, descent, smoothness):
        left, _, bias, noise = honest(path, descent, smoothness)
        return left, 0.0, bias, noise

    monkeypatch.setattr(convergence, "bound_terms", without_descent)
    assert "Mean norm(grad L_m)^2" in alarms(convergence.theorem3(ground))


def test_theorem_4_notices_a_wrong_alpha_j(monkeypatch, ground) -> None:
    parts = type(ground.tiny_exact.estimates)
    honest = parts.alpha_j_parts

    def wrong(self, rho, batch_size=1.0):
        top, bottom = honest(self, rho, batch_size)
        return top - self.trace_dot_marginal * (1 / rho - 1), bottom

    monkeypatch.setattr(parts, "alpha_j_parts", wrong)
    assert "alpha_J" in alarms(convergence.theorem4(ground))


def test_the_reference_point_notices_another_temperature(monkeypatch, ground) -> None:
    honest = ground.build
    warm = Ground(ground.config)
    monkeypatch.setattr(warm, "build", lambda **changes: honest(**changes | {"temperature": 0.95}))
    assert "E g_t = mu." in alarms(bias.reference_point(warm))


def test_the_drift_law_notices_a_missing_term(monkeypatch, ground) -> None:
    honest = bias.drift_law

    def first_term(oracle, cell, direction, beta):
        return honest(oracle, cell, direction, beta) - honest(oracle, cell, direction, 1e-9) * (beta / 1e-9)

    monkeypatch.setattr(bias, "drift_law", first_term)
    assert "to first order in delta" in alarms(bias.drift(ground))


def test_the_marginal_notices_an_anchor_that_is_none(monkeypatch, ground) -> None:
    monkeypatch.setattr(bias, "anchored_snis", lambda log_weights, scores: scores.mean(axis=0))
    assert "Anchored SNIS" in alarms(bias.marginal_gradient(ground))


def test_appendix_b_on_the_oracle_notices_a_wrong_divisor(monkeypatch, ground) -> None:
    honest = log_probabilities.question_variances
    monkeypatch.setattr(log_probabilities, "question_variances", lambda oracle: honest(oracle) * [0.8, 1.0, 1.0, 1.0])
    assert "Five responses" in alarms(log_probabilities.appendix_b(ground))


@pytest.mark.slow
def test_the_embedded_model_is_measured() -> None:
    measured = log_probabilities.embedded_variances(12, seed=0)
    assert measured.shape == (12, 4)
    assert (measured[:, 2:] > 0).all()
    again = log_probabilities.embedded_variances(12, seed=0)
    np.testing.assert_allclose(measured, again, rtol=1e-6)


def test_bad_input(tmp_path: Path) -> None:
    for arguments in (("--draws", 10), ("--beta", 0), ("--embedded-prompts", 3)):
        failed_politely(run("theorems", *arguments, "--output", tmp_path / "o"), arguments[0])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    failed_politely(run("theorems", "--output", tmp_path / "other"), "not empty")
    with pytest.raises(UserError):
        TheoremConfig(beta=-1)


def test_numbers_that_are_not_never_agree() -> None:
    assert not report.Numbers("q", float("nan"), 0.0).agree
    assert not report.Numbers("q", float("inf"), 0.0, relation=">=").agree
    assert report.Numbers("q", 1.0, 2.0, relation="<=").agree
    assert not report.Numbers("q", 1.0, 2.0, relation=">=").agree
