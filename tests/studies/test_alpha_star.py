"""The alpha-star study on oracle records: every row of the report against the exact value; resume; refusal."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import join
from bvpo_stats.gradients.ladder import MarginalChoice
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.stream import pair_gradients
from bvpo_stats.lab.oracle import exact_moments
from bvpo_stats.model.subset import lora_subset
from bvpo_stats.statistics.alpha import adam_metric, alpha_from_gradients, direction_alpha, in_metric
from bvpo_stats.statistics.estimates import noise_scale
from bvpo_stats.statistics.intervals import FEWEST
from bvpo_stats.statistics.mixtures import CHOICES
from bvpo_stats.statistics.moments import summary_of_arrays
from bvpo_stats.studies.alpha_star import run as study
from bvpo_stats.studies.alpha_star.report import AlphaReport, AlphaSettings, Weight
from bvpo_stats.studies.alpha_star.run import (
    AlphaOptions,
    alpha_star,
)
from tests.studies.alpha_inputs import estimate, records, small_oracle

Z = 4.0  # of some 25 rows none lies further out in one run of ten thousand


@pytest.fixture(scope="module")
def oracle():
    return small_oracle()


@pytest.fixture(scope="module")
def report(oracle):
    pairs, traces = records(oracle, 240)
    return estimate(oracle.policy, pairs, traces=traces)


@pytest.fixture(scope="module")
def drifted():
    return small_oracle(temperature=0.8, drift=0.05)


@pytest.fixture(scope="module")
def drifted_report(drifted):
    pairs, traces = records(drifted, 120, seed=1)
    options = AlphaOptions(stream=StreamOptions(half_splits=True), settings=AlphaSettings(eta_l=0.5))
    return estimate(drifted.policy, pairs, traces=traces, options=options)


def check_rows(report, exact):
    """Every number of the report that has a standard error, against the oracle."""
    tau = noise_scale(report.batch_size, report.eta_l)
    truth = exact.estimates
    expected = {
        "mse": {
            "trace": exact.error(1.0, tau),
            "empty": exact.error(0.0, tau),
            "half": exact.error(0.5, tau),
            "zero": float(truth.marginal_sq),
            "alpha_star": exact.error(min(1.0, max(0.0, exact.alpha(tau))), tau),
        },
        "bias_sq": {
            "trace": float(truth.bias_trace_sq),
            "empty": float(truth.bias_empty_sq),
            "cross": float(truth.bias_cross),
        },
        "variance": {
            "trace": exact.tr_sigma_t,
            "empty": exact.tr_sigma_e,
            "cross": exact.tr_sigma_te,
            "trace_sampling": exact.trace_part,
        },
    }
    for part, rows in expected.items():
        for name, value in rows.items():
            found = getattr(report, part)[name]
            error = report.uncertainty[part][name].standard_error
            assert abs(found - value) <= Z * error + 1e-12, (part, name, found, value, error)
    for point in report.curve:
        alpha = min(1.0, max(0.0, exact.alpha(point.eta_l / point.batch_size)))
        spread = point.high - point.low  # 95% intervals, doubled: about four standard errors
        assert point.low - spread / 2 <= alpha <= point.high + spread / 2, point


def test_every_row_is_the_oracles_at_the_reference_point(report, oracle):
    exact = exact_moments(oracle)
    check_rows(report, exact)
    assert report.marginal.method == "reference-point"
    assert report.alpha_star.identified
    assert report.alpha_star.low <= exact.alpha(1 / 128) <= report.alpha_star.high
    assert report.alpha_var.unclipped_low <= exact.curve[1] / exact.curve[3] <= report.alpha_var.unclipped_high
    assert report.warnings == []
    assert report.n_parameters == len(oracle.theta)


def test_every_row_is_the_oracles_off_the_reference(drifted_report, drifted):
    """Posterior traces: their bias, of order 1/K, is far below the error of 120 prompts; the report flags it."""
    exact = exact_moments(drifted)
    check_rows(drifted_report, exact)
    assert drifted_report.marginal.method in ("posterior", "multilevel", "anchored", "prior")
    assert any("biased by construction" in warning for warning in drifted_report.warnings)
    assert 1 < drifted_report.marginal.ess <= drifted_report.marginal.traces_per_answer
    assert drifted_report.marginal.half_split["agrees"]
    assert drifted_report.alpha_j is not None
    assert {point.eta_l for point in drifted_report.curve} == {0.5, 1.0}


def test_json_round_trip_and_the_promised_fields(report, drifted_report):
    for one in (report, drifted_report):
        assert AlphaReport.from_json(one.to_json()) == one
    plain = json.loads(report.to_json())
    promised = {
        "alpha_star": {"value", "low", "high", "level", "unclipped", "identified"},
        "mse": {"trace", "empty", "zero", "half", "alpha_star"},
        "bias_sq": {"trace", "empty", "cross"},
        "variance": {"trace", "empty", "cross", "trace_sampling"},
        "marginal": {"method", "traces_per_answer", "ess", "anchor_gap", "k_hat", "estimable"},
    }
    for part, names in promised.items():
        assert names <= set(plain[part]), part
    assert {"batch_size", "eta_l", "n_prompts", "n_parameters", "seed", "versions"} <= set(plain)
    assert {"batch_size", "eta_l", "alpha", "low", "high"} <= set(plain["curve"][0])
    with pytest.raises(UserError, match="no alpha-star report"):
        AlphaReport.from_json("{}")


def test_figures_and_texts(drifted_report, tmp_path):
    figures = drifted_report.plot(tmp_path)
    assert {path.stem for path in figures} == {
        "error_over_alpha",
        "alpha_over_batch_size",
        "alpha_by_layer",
        "trace_weights",
    }
    assert all(path.stat().st_size > 5_000 for path in figures)
    text = drifted_report.markdown(figures)
    assert "alpha*" in drifted_report.answer
    assert all(f"figures/{path.name}" in text for path in figures)
    assert all(title in drifted_report._repr_html_() for title in drifted_report.sections())


def test_no_alpha_star_without_mu(oracle, monkeypatch, tmp_path):
    """The last rung: variances and alpha_var are left, and nothing is called alpha*."""
    choice = MarginalChoice("none", "not estimable", "all weights have collapsed", estimable=False)
    monkeypatch.setattr(study, "choose_marginal", lambda *_: choice)
    pairs, _ = records(oracle, 40)
    refused = estimate(oracle.policy, pairs)
    assert refused.alpha_star is None
    assert refused.curve == []
    assert set(refused.mse.values()) | set(refused.bias_sq.values()) == {None}
    assert refused.variance["trace"] > 0
    assert 0 < refused.alpha_var.value < 1
    assert refused.alpha_var.identified == (refused.alpha_var.n_eff >= FEWEST)
    rows = [label for rows in refused.sections().values() for label, *_ in rows]
    assert not [label for label in rows if label.startswith("alpha*")]
    assert "not estimable" in refused.answer
    assert AlphaReport.from_json(refused.to_json()) == refused
    assert refused.plot(tmp_path) == []


def test_small_drift_gives_a_range_and_no_alpha_star(tmp_path):
    """No bank, theta close to theta_ref: the rung says where alpha* lies, under another name than alpha*."""
    near = small_oracle(drift=0.004)
    pairs, _ = records(near, 200)
    found = estimate(near.policy, pairs)
    assert found.marginal.rung == "small drift"
    assert found.alpha_star is None
    assert found.alpha_range.informative
    assert found.alpha_range.low <= exact_moments(near).alpha(1 / 128) <= found.alpha_range.high
    assert found.alpha_range.high - found.alpha_range.low < 0.7
    assert "no estimate" in found.markdown()
    assert "alpha* lies between" in found.answer
    assert AlphaReport.from_json(found.to_json()) == found


def test_resumed_pass_gives_the_same_moments(oracle, tmp_path, monkeypatch):
    """A pass that is killed after every batch goes on from its file; nothing is done twice."""
    pairs, _ = records(oracle, 40)
    stream = StreamOptions(max_tokens=400, method="reference-point")
    subset = lora_subset(oracle.policy.model)
    options = AlphaOptions(stream=stream, groups=4)
    whole = study._estimate(oracle.policy, subset, join(pairs), options, "LoRA adapter")
    real, seen = study.gradient_batches, []

    def one_batch_then_killed(*arguments, **keywords):
        batches = real(*arguments, **keywords)
        batch = next(batches)
        seen.extend(batch.prompt_ids)
        yield batch
        if next(batches, None) is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(study, "gradient_batches", one_batch_then_killed)
    runs = 0
    while True:
        runs += 1
        try:
            resumed = study._estimate(oracle.policy, subset, join(pairs), options, "LoRA adapter", tmp_path)
            break
        except KeyboardInterrupt:
            assert runs < 50
    assert runs > 3
    assert len(seen) == len(set(seen)) == 40
    assert resumed == whole  # to the last bit: a batch does not depend on what is done already


def test_damaged_checkpoint_is_named(oracle, tmp_path):
    pairs, _ = records(oracle, 12)
    joined, subset = join(pairs), lora_subset(oracle.policy.model)
    (tmp_path / "moments.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match=r"moments\.npz .*Delete it"):
        study._estimate(oracle.policy, subset, joined, AlphaOptions(), "LoRA adapter", tmp_path)


def test_rows_as_arrays_give_the_same_alpha_and_interval(drifted):
    pairs, traces = records(drifted, 40)
    subset, stream = lora_subset(drifted.policy.model), StreamOptions(method="posterior")
    batches = list(study.gradient_batches(drifted.policy, subset, join(pairs, traces).examples, stream))
    t, e, m = (np.concatenate([np.hstack(list(b.vectors[name].values())) for b in batches]) for name in "tem")
    ids = [prompt for batch in batches for prompt in batch.prompt_ids]
    report = estimate(drifted.policy, pairs, traces=traces, options=AlphaOptions(stream, AlphaSettings(batch_size=1)))
    assert report.n_groups == report.n_prompts == 40
    assert report.alpha_star.identified
    for clusters in (ids, None):  # which prompt it is does not matter while each is left out alone
        found = Weight.of(alpha_from_gradients(t, e, m, batch_size=1, clusters=clusters))
        for name in ("value", "unclipped", "low", "high", "unclipped_low", "unclipped_high"):
            assert getattr(found, name) == pytest.approx(getattr(report.alpha_star, name), rel=1e-8), name
        assert found.identified == report.alpha_star.identified
        assert found.n_eff == pytest.approx(report.alpha_star.n_eff, rel=1e-8)


def test_adam_metric_is_that_of_the_exact_covariances(oracle):
    """One number for all leaves alpha alone; a metric that keeps a single layer gives that layer's alpha."""
    pairs, _ = records(oracle, 60)
    subset = lora_subset(oracle.policy.model)
    flat = {name: np.full(weight.numel(), 4.0) for name, weight in subset.parameters.items()}
    options = AlphaOptions(second_moments=flat, epsilon=1e-12)
    plain = estimate(oracle.policy, pairs, options=options)
    assert plain.alpha_adam.unclipped == pytest.approx(plain.alpha_star.unclipped, rel=1e-9)
    one = {name: v if ".layers.1." in name else np.full_like(v, 1e40) for name, v in flat.items()}
    layer = estimate(oracle.policy, pairs, options=replace(options, second_moments=one))
    expected = next(entry.alpha for entry in layer.layers if entry.block == "layers.1")
    assert layer.alpha_adam.value == pytest.approx(expected, rel=1e-9)


def test_pairs_without_partners_and_too_few_prompts(oracle):
    pairs, _ = records(oracle, 30)
    thinking = [pair for pair in pairs if pair.mode == "thinking"]
    nothinking = [replace(pair, prompt_id=f"x{pair.prompt_id}") for pair in pairs if pair.mode == "nothinking"]
    with pytest.raises(UserError, match="share no prompts"):
        estimate(oracle.policy, [*thinking, *nothinking])
    with pytest.raises(UserError, match=r"2 prompts .* three"):
        estimate(oracle.policy, [*pairs[:2], *pairs[30:32]])


def test_an_impossible_level_is_refused_before_any_work():
    with pytest.raises(UserError, match="level"):
        AlphaSettings(level=95)


RATE = 0.3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_eta_l_and_alpha_in_the_optimizer_s_metric(oracle, optimizer):
    """At theta_ref every margin is 0, so sqrt(l'') dz is -g_t and all of it follows from the gradients themselves."""
    pairs, _ = records(oracle, 40)
    policy, rng = oracle.policy, np.random.default_rng(3)
    g = pair_gradients(policy, pairs)
    v = rng.uniform(0.01, 1, g.t.shape[1]) if optimizer == "adamw" else None
    metric = np.ones(g.t.shape[1]) if v is None else 1 / (np.sqrt(v) + 1e-8)
    subset = lora_subset(policy.model)
    sizes = np.cumsum([weight.numel() for weight in subset.parameters.values()])
    # Weights stand in the gradients block by block, as they do in the subset here.
    moments = None if v is None else dict(zip(subset.parameters, np.split(v, sizes[:-1]), strict=True))
    report = alpha_star(policy, pairs, batch_size=8, optimizer=optimizer, learning_rate=RATE, second_moments=moments)
    found = report.optimizer
    t, e = (x.astype(float) * np.sqrt(metric) for x in (g.t, g.e))
    slopes = t @ (t - e).T
    along = np.mean([np.delete(row, i).var(ddof=1) for i, row in enumerate(slopes)])
    assert found.eta_l == pytest.approx(RATE * along / (t - e).var(axis=0, ddof=1).sum(), rel=1e-6)
    assert found.eta_l_low < found.eta_l < found.eta_l_high
    assert (found.n_pairs, found.name, report.eta_l) == (40, optimizer, 1.0)
    theorem4, measured, direction = found.alphas
    for row, eta_l in ((theorem4, 1.0), (measured, found.eta_l)):
        star = alpha_from_gradients(t, e, batch_size=8, eta_l=eta_l)
        assert row.alpha.unclipped == pytest.approx(star.unclipped, rel=1e-6)
        assert row.alpha.low == pytest.approx(star.low, abs=1e-6)
        parts = star.estimates
        if star.identified and 0 < star.unclipped < 1:  # the jackknife's correction is of order 1/N
            excess = 1 - float(parts.error(star.value, star.tau) / parts.error(0.5, star.tau))
            assert row.excess == pytest.approx(excess, abs=0.2)
    expected = direction_alpha(summary_of_arrays({"t": t, "e": e}), batch_size=8)
    assert direction.alpha.unclipped == pytest.approx(expected.unclipped, rel=1e-6)
    rows = {label: value for label, value, _ in report.sections()[f"In the metric of {optimizer}"]}
    assert rows["alpha* at eta L = 1 (Theorem 4)"] == str(theorem4.alpha)
    assert AlphaReport.from_json(report.to_json()) == report


def test_adamw_without_a_state_takes_the_second_moments_of_these_gradients(oracle):
    pairs, _ = records(oracle, 30)
    g = pair_gradients(oracle.policy, pairs)
    mix = (g.t.astype(float) + g.e) / 2
    mean, variance = mix.mean(axis=0), mix.var(axis=0, ddof=1)
    v = np.maximum(mean**2 - variance / 30, 0) + variance / 8
    report = alpha_star(oracle.policy, pairs, batch_size=8, optimizer="adamw", learning_rate=RATE)
    scaled = in_metric({"t": g.t, "e": g.e}, adam_metric(v))
    star = alpha_from_gradients(**scaled, batch_size=8)
    assert report.alpha_adam.unclipped == pytest.approx(star.unclipped, rel=1e-5)
    assert "these gradients' second moments at batch size 8" in report.optimizer.metric
    assert any("none along its own noise" in line for line in report.present().notes)


def test_advice_and_mixtures_are_those_of_the_moments(drifted_report, report):
    assert [one.choice for one in report.advice] == list(CHOICES)
    assert [one.estimator for one in report.mixture] == ["t", "t2", "t4", "e"]
    rows = [row for title, rows in report.sections().items() if title.startswith("What would help") for row in rows]
    assert len(rows) == len(CHOICES)
    assert rows[0][0].startswith("the mix at alpha* (alpha = ")
    assert any("tokens, a D_e pair" in line and "second trace" in line for line in report.present().notes)
    assert "What would help most" in report.markdown()
    tokens = report.tokens
    no_mix = next(one for one in report.advice if one.choice == "no_mix")
    assert no_mix.batch_size == pytest.approx(128 * (tokens["trace"] + tokens["empty"]) / tokens["trace"])
    assert all(one.low is None or one.low <= one.change + 0.05 for one in drifted_report.advice)


def test_an_optimizer_that_cannot_be_measured_is_refused_or_falls_back(oracle):
    pairs, _ = records(oracle, 30)
    for name, wanted in (("adam", "adamw, sgd"), ("sgd", "leave one out")):
        with pytest.raises(UserError, match=wanted):
            alpha_star(oracle.policy, pairs, optimizer=name, learning_rate=RATE, second_moments={"x": np.ones(1)})
    with pytest.raises(UserError, match="give `learning_rate`"):
        alpha_star(oracle.policy, pairs, optimizer="sgd")
    with pytest.raises(UserError, match="learning_rate=-1"):
        alpha_star(oracle.policy, pairs, optimizer="sgd", learning_rate=-1.0)
