"""Alpha estimated during a run: the steps' own sums, the probe set, and when an estimate is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Joined
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.stream import gradient_batches, pair_gradients
from bvpo_stats.lab.oracle import OracleConfig, build_oracle, draw_pairs, draw_traces, exact_moments
from bvpo_stats.store.tables import write_records
from bvpo_stats.training import StepSums
from bvpo_stats.training.gradient import mixed_gradient, scored_gradient
from bvpo_stats.training.trainer import BVPOTrainer
from tests.training.records import adapted, banks, both_sets, settings

PROMPTS = 24
ADAPTIVE = {"alpha": "adaptive", "alpha_probe_prompts": 12, "alpha_update_steps": 2}


def adaptive(model: Path, folder: Path, *, traces: bool = True, **changes: object) -> BVPOTrainer:
    """A trainer off the reference point."""
    policy = adapted(model, "float64", drift=0.3)
    pairs = both_sets(policy, PROMPTS)
    bank = banks(policy, pairs) if traces else []
    return BVPOTrainer(policy, settings(folder, **(ADAPTIVE | changes)), pairs, traces=bank)


@pytest.mark.parametrize("max_tokens", [80, 16_384])
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_sums_and_gradient_of_a_step(random_model: Path, tmp_path: Path, max_tokens: int, loss_type: str) -> None:
    """Against each pair's own gradient, formed by the estimators, and against the plain step."""
    trainer = adaptive(random_model, tmp_path, max_tokens=max_tokens, loss_type=loss_type)
    prompts, ignore = trainer.selection.train[:7], lambda *_: None
    found, sums = scored_gradient(trainer._pair_model, trainer._subset, prompts, 0.3, ignore)
    plain = mixed_gradient(trainer._pair_model, prompts, 0.3, ignore)
    assert float(found.loss) == pytest.approx(float(plain.loss), rel=1e-12)
    for ours, theirs in zip(found.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
    options = StreamOptions(trainer.config.objective(), method="none", reference="adapter")
    g = pair_gradients(trainer.policy, Joined(prompts), subset=trainer._subset, options=options)
    truth, step = StepSums.of_units(g.t, g.e), sums.step_sums()
    assert (step.examples, step.squares) == (7, 7)
    np.testing.assert_allclose(step.total, truth.total, rtol=1e-9)
    np.testing.assert_allclose(step.diagonal, truth.diagonal, rtol=1e-9)


def test_variances_from_the_steps_are_the_oracles(tmp_path: Path) -> None:
    """At a learning rate of nothing, what the steps say of the covariances is unbiased for the exact ones."""
    oracle = build_oracle(OracleConfig(n_symbols=2, max_trace=2, n_answers=3, n_prompts=2, seed=3))
    rng = np.random.default_rng(1)
    thinking, nothinking = draw_pairs(oracle, 600, rng)
    args = settings(tmp_path, alpha="adaptive", alpha_probe_prompts=24, learning_rate=1e-12, max_steps=18,
                    per_device_train_batch_size=32, alpha_update_steps=1000, alpha_sums_steps=1,
                    logging_steps=100)  # fmt: skip
    trainer = BVPOTrainer(oracle.policy, args, thinking, nothinking)
    trainer.train()
    exact = exact_moments(oracle, Objective("dpo", 0.1))
    truth = [exact.tr_sigma_t, exact.product_te - exact.mean_t @ exact.mean_e, exact.tr_sigma_e]
    steps = trainer.estimator.controller.steps
    error = np.sqrt(np.diag(steps.covariance))
    assert steps.steps == 18
    assert np.abs((steps.mean - truth) / error).max() < 4
    assert error[0] < 0.2 * truth[0]  # tight enough to tell


def test_the_probe_set_is_held_out_and_looked_at_as_alpha_star_does(random_model: Path, tmp_path: Path) -> None:
    trainer = adaptive(random_model, tmp_path)
    probe, train = ({p.prompt_id for p in rows} for rows in (trainer.selection.probe, trainer.selection.train))
    assert (len(probe), len(train), len(probe & train)) == (12, PROMPTS - 12, 0)
    again = adaptive(random_model, tmp_path)
    assert {p.prompt_id for p in again.selection.probe} == probe  # the seed decides
    moments, reason = trainer.estimator._probe.look()
    assert reason == "mu from posterior traces of each answer"
    policy = trainer.policy
    options = StreamOptions(Objective("dpo", 0.1), method="posterior", traces_per_answer=4)
    sums: dict[str, float] = {}
    for batch in gradient_batches(policy, trainer._subset, trainer.selection.probe, options):
        for member, blocks in batch.vectors.items():
            sums[member] = sums.get(member, 0.0) + sum(float((block**2).sum()) for block in blocks.values())
    summary = moments.finalize()
    for member, total in sums.items():
        index = summary.index(member)
        absolute = (summary.M + summary.shift)[0, :, index, index].sum()
        assert absolute == pytest.approx(total / len(probe), rel=1e-9), member


def test_alpha_is_used_after_the_data_that_chose_it(random_model: Path, tmp_path: Path) -> None:
    trainer = adaptive(random_model, tmp_path, max_steps=6, learning_rate=3e-2, warmup_steps=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["alpha"] for entry in entries[1:]] == [entry["alpha/next"] for entry in entries[:-1]]
    assert [update["step"] for update in trainer.estimator.updates] == [-1, 1, 3, 5]
    for name in ("alpha/low", "alpha/high", "alpha/bias_trace_sq", "alpha/var_cross", "alpha/trace_share",
                 "alpha/eta_l", "alpha/time_share", "alpha/tau"):  # fmt: skip
        assert np.isfinite(entries[-1][name]), name
    # eta L follows the schedule: half the peak after one of two warm-up steps.
    assert entries[0]["alpha/eta_l"] == pytest.approx(0.5)
    assert entries[1]["alpha/eta_l"] == pytest.approx(1.0)
    assert entries[0]["alpha"] == 0.5


def test_smoothness_is_measured_before_the_first_step(random_model: Path, tmp_path: Path) -> None:
    """L is the curvature along the noise of the probe set; where the loss is concave there, eta L is 0."""
    trainer = adaptive(random_model, tmp_path, max_steps=1, eta_l="auto")
    trainer.train()
    smoothness = trainer.estimator.step_size.smoothness
    assert smoothness != 0
    assert trainer.estimator.updates[0]["eta_l"] == pytest.approx(max(smoothness, 0.0) * 1e-2)


def test_traces_from_a_file(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model, "float64", drift=0.3)
    pairs = both_sets(policy, PROMPTS)
    bank = banks(policy, pairs)
    write_records(tmp_path / "traces.parquet", bank)
    trainer = BVPOTrainer(policy, settings(tmp_path, **ADAPTIVE), pairs, traces=tmp_path)
    known = adaptive(random_model, tmp_path)
    assert trainer.selection == known.selection
    assert len(trainer.selection.probe[0].traces) > 0


def test_a_small_probe_set_holds_the_prior(
    random_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = adaptive(random_model, tmp_path, alpha_probe_prompts=5, alpha_prior=0.4, max_steps=2)
    assert "too small for an interval: alpha is held at the prior 0.4" in caplog.text
    assert (len(trainer.selection.probe), len(trainer.selection.train)) == (0, PROMPTS)
    trainer.train()
    assert [entry["alpha"] for entry in trainer.state.log_history if "loss" in entry] == [0.4, 0.4]
    assert not trainer.estimator.wants_sums  # nothing is spent on an estimate that cannot be


def test_without_traces_mu_is_that_of_the_reference_point(
    random_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = adapted(random_model, "float64", drift=0.0)
    args = settings(tmp_path, **ADAPTIVE)
    trainer = BVPOTrainer(policy, args, both_sets(policy, PROMPTS))
    assert "no trace bank: mu = E g_t is taken at the reference point" in caplog.text
    trainer.train()
    assert [update["step"] for update in trainer.estimator.updates] == [-1]
    assert "E g_t exactly" in trainer.estimator.mu
    assert trainer.estimator.updates[0]["bias_trace_sq"] == pytest.approx(0, abs=1e-15)


def test_where_mu_cannot_be_had_the_prior_is_held_and_the_reason_given(random_model: Path, tmp_path: Path) -> None:
    trainer = adaptive(random_model, tmp_path, traces=False, max_steps=2)  # off the reference point, no bank
    trainer.train()
    assert "mu is not estimable here: the policy is off theta_ref" in trainer.estimator.mu
    assert trainer.estimator.controller.record.held
    assert trainer.alpha == 0.5


def test_an_adapter_is_needed(random_model: Path, tmp_path: Path) -> None:
    from bvpo_stats.model.policy import PolicyOptions, load_policy

    policy = load_policy(PolicyOptions(model=str(random_model)))
    with pytest.raises(UserError, match="formed for LoRA adapters only"):
        BVPOTrainer(policy, settings(tmp_path, **ADAPTIVE), both_sets(policy, PROMPTS))


def test_traces_of_another_model_are_refused(random_model: Path, tmp_path: Path) -> None:
    oracle = build_oracle(OracleConfig(n_symbols=2, max_trace=2, n_answers=3, n_prompts=2, seed=3))
    rng = np.random.default_rng(0)
    thinking, nothinking = draw_pairs(oracle, 40, rng)
    traces = draw_traces(oracle, thinking, 2, rng)
    policy = adapted(random_model)
    with pytest.raises(UserError, match="was sampled by"):
        BVPOTrainer(policy, settings(tmp_path, **ADAPTIVE), thinking, nothinking, traces=traces)


def test_one_step_in_so_many_feeds_the_variances(random_model: Path, tmp_path: Path) -> None:
    trainer = adaptive(random_model, tmp_path, max_steps=5, alpha_sums_steps=2)
    trainer.train()
    assert trainer.estimator.controller.steps.steps == 3  # steps 0, 2 and 4
