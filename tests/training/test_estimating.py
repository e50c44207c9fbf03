"""Alpha estimated during a run: the steps' own products, the optimizer's metric, and looks at the trace gradient's
bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Example, Joined
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.stream import gradient_batches, pair_gradients
from bvpo_stats.lab.oracle import OracleConfig, build_oracle, draw_pairs, exact_moments
from bvpo_stats.model.metric import optimizer_metric
from bvpo_stats.model.policy import PolicyOptions, load_policy
from bvpo_stats.store.tables import write_records
from bvpo_stats.training.alpha.rules.base import Parts
from bvpo_stats.training.gradient import Backward, Passes, SetGradients, add_parted_gradient, curvature_along
from bvpo_stats.training.trainer import BVPOTrainer
from tests.training.records import adapted, banks, both_sets, gradients, settings, step_of

PROMPTS = 24
ADAPTIVE = {"alpha": "adaptive", "alpha_update_steps": 2, "alpha_rule": "theorem4"}


def adaptive(model: Path, folder: Path, *, traces: bool = True, **changes: object) -> BVPOTrainer:
    """A trainer off the reference point."""
    policy = adapted(model, "float64", drift=0.3)
    pairs = both_sets(policy, PROMPTS)
    bank = banks(policy, pairs) if traces else []
    return BVPOTrainer(policy, settings(folder, **(ADAPTIVE | changes)), pairs, traces=bank)


def parted(trainer: BVPOTrainer, prompts: Sequence[Example], alpha: float) -> tuple[SetGradients, Passes]:
    """The gradients of the two sets, which are added to the weights' as well."""
    pair_model, share, backward = trainer._pair_model, 1 / len(prompts), Backward(trainer.accelerator, trainer.model)
    trainer.model.zero_grad()
    return add_parted_gradient(pair_model, prompts, alpha, share, len(prompts), backward, lambda *_: None)[1:]


@pytest.mark.parametrize("max_tokens", [80, 16_384])
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_gradients_of_the_two_sets(random_model: Path, tmp_path: Path, max_tokens: int, loss_type: str) -> None:
    """Against each pair's own gradient, formed by the estimators, and against the plain step."""
    trainer = adaptive(random_model, tmp_path, max_tokens=max_tokens, loss_type=loss_type)
    prompts = trainer.selection.train[:7]
    sums, _ = parted(trainer, prompts, 0.3)
    ours = gradients(trainer.model)
    fixed = BVPOTrainer(
        trainer.policy,
        settings(tmp_path, max_tokens=max_tokens, loss_type=loss_type, alpha=0.3, per_device_train_batch_size=7),
        [pair for prompt in prompts for pair in prompt.pairs],
    )
    _, theirs = step_of(fixed, 7)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-9, atol=1e-13)
    options = StreamOptions(trainer.config.objective(), method="none", reference="adapter")
    g = pair_gradients(trainer.policy, Joined(prompts), subset=trainer.estimator.looks._subset, options=options)
    np.testing.assert_allclose(sums.trace.numpy(), g.t.sum(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sums.empty.numpy(), g.e.sum(axis=0), rtol=1e-9, atol=1e-12)
    assert sums.prompts == 7


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "ipo"])
def test_curvature_along_a_direction(random_model: Path, tmp_path: Path, loss_type: str) -> None:
    """One forward pass against l'' (dz . v)^2 from single gradients; the weights come back bit for bit."""
    trainer = adaptive(random_model, tmp_path, loss_type=loss_type, beta=0.5)
    pair_model, prompts = trainer._pair_model, trainer.selection.train[:5]
    before = [weight.detach().clone() for weight in pair_model.weights]
    _, passes = parted(trainer, prompts, 0.3)
    size = sum(weight.numel() for weight in pair_model.weights)
    direction = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total, pairs = curvature_along(pair_model, passes, direction, 1e-6)
    assert pairs == 5
    assert all(torch.equal(a, b) for a, b in zip(before, pair_model.weights, strict=True))
    wanted, objective = 0.0, pair_model.objective
    for prompt in prompts:
        options = StreamOptions(objective, method="none", reference="adapter")
        g = pair_gradients(trainer.policy, Joined((prompt,)), subset=trainer.estimator.looks._subset, options=options)
        slope = float(g.t[0] @ direction.numpy())  # l'(z) dz . v
        wanted += slope**2 * _ratio(trainer, prompt)
    assert total == pytest.approx(wanted, rel=1e-4)


def _ratio(trainer: BVPOTrainer, prompt) -> float:
    """l'' / l'^2 of a pair, by differences along the chosen response's log-probability."""
    _, passes = parted(trainer, [prompt], 0.5)
    logps, objective = passes[0][1], trainer._pair_model.objective

    def at(shift: float) -> float:
        moved = type(logps)(logps.chosen + shift, *list(vars(logps).values())[1:])
        return float(objective(moved).chosen_weight)

    return (at(1e-5) - at(-1e-5)) / 2e-5 / at(0.0) ** 2


def test_variances_from_the_steps_are_the_oracles(tmp_path: Path) -> None:
    """At a learning rate of nothing and plain SGD, what the steps say is unbiased for the exact moments."""
    oracle = build_oracle(OracleConfig(n_symbols=2, max_trace=2, n_answers=3, n_prompts=2, seed=3))
    rng = np.random.default_rng(1)
    thinking, nothinking = draw_pairs(oracle, 960, rng)
    args = settings(tmp_path, alpha="adaptive", learning_rate=1e-12, max_steps=60, optim="sgd", eta_l=1.0,
                    per_device_train_batch_size=16, logging_steps=100)  # fmt: skip
    trainer = BVPOTrainer(oracle.policy, args, thinking, nothinking)
    trainer.train()
    assert trainer.estimator.metric == "that of SGD: the identity"
    exact = exact_moments(oracle, Objective("dpo", 0.1))
    h = exact.mean_t - exact.mean_e
    te = exact.product_te - exact.mean_t @ exact.mean_e
    truth = [h @ h, exact.mean_e @ h, exact.tr_sigma_e - te, exact.tr_sigma_t + exact.tr_sigma_e - 2 * te]
    averages = trainer.estimator.controller.averages
    parts = Parts.of(np.concatenate([averages.mean, np.zeros(2)]), averages.batch)
    said = np.array([parts.h_sq, parts.e_h, parts.P1, parts.Q1])
    v = averages.covariance(3.0)
    errors = np.sqrt([v[3, 3], v[4, 4], 256 * (v[4, 4] + v[1, 1]), 256 * (v[0, 0] + v[3, 3])])
    assert np.abs((said - truth) / errors).max() < 4
    assert errors[3] < 0.3 * truth[3]  # tight enough to tell


def test_looks_are_at_prompts_of_the_step_and_nothing_is_held_out(random_model: Path, tmp_path: Path) -> None:
    trainer = adaptive(random_model, tmp_path, max_steps=3)
    assert len(trainer.selection.train) == PROMPTS
    trainer.train()
    assert trainer.estimator.mu == "c = E g_t - mu from posterior traces"
    assert trainer.estimator.controller.bias.prompts == 8
    looks, lag = trainer.estimator.looks, trainer.estimator.stream.lag
    prompts = trainer.selection.train[:4]
    count, sums, squares, _ = looks.look(prompts, [lag.h])
    options = StreamOptions(Objective("dpo", 0.1), method="posterior", traces_per_answer=4)
    (batch,) = gradient_batches(trainer.policy, looks._subset, prompts, options)
    flat = {name: np.concatenate(list(batch.vectors[name].values()), axis=1) for name in "tm"}
    x = (flat["t"] - flat["m"]) @ lag.h.numpy()
    assert count == 4
    assert sums[0] == pytest.approx(x.sum(), rel=1e-9)
    assert squares[0, 0] == pytest.approx(x @ x, rel=1e-9)


def test_a_bank_that_covers_some_prompts_is_looked_at_where_it_does(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model, "float64", drift=0.3)
    pairs = both_sets(policy, PROMPTS)
    bank = [trace for trace in banks(policy, pairs) if int(trace.prompt_id[1:]) < 6]
    trainer = BVPOTrainer(policy, settings(tmp_path, **ADAPTIVE, max_steps=3), pairs, traces=bank)
    trainer.train()
    assert 0 <= trainer.estimator.controller.bias.prompts <= 6
    assert len(trainer.estimator.looks.examples) == 6


def test_alpha_is_used_after_the_data_that_chose_it(random_model: Path, tmp_path: Path) -> None:
    trainer = adaptive(random_model, tmp_path, max_steps=12, learning_rate=3e-2, warmup_steps=2,
                       per_device_train_batch_size=4)  # fmt: skip
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["alpha"] for entry in entries[1:]] == [entry["alpha/next"] for entry in entries[:-1]]
    assert len({entry["alpha"] for entry in entries}) > 3
    for name in ("alpha/low", "alpha/high", "alpha/h_sq", "alpha/Q1", "alpha/c_h", "alpha/eta_l", "alpha/time_share",
                 "alpha/tau", "alpha/prompts"):  # fmt: skip
        assert np.isfinite(entries[-1][name]), name
    # Before it is measured eta L is 1 at the peak and follows the schedule: half of it after one of two warm-up steps.
    assert entries[0]["alpha/eta_l"] == pytest.approx(0.5)
    assert trainer.estimator.step_size.measurements == 2
    assert entries[0]["alpha"] == 0.5
    assert trainer.estimator.metric == "that of AdamW: 1 / (sqrt(v) + eps)"


def test_all_weights_can_be_trained_with_an_estimated_alpha(random_model: Path, tmp_path: Path) -> None:
    policy = load_policy(PolicyOptions(model=str(random_model)))
    args = settings(tmp_path, **ADAPTIVE, max_steps=8, per_device_train_batch_size=2, learning_rate=1e-3)
    trainer = BVPOTrainer(policy, args, both_sets(policy, PROMPTS))
    trainer.train()
    assert trainer.estimator.controller.decision.low is not None
    assert trainer.estimator.stream.lag.h.numel() == sum(w.numel() for w in policy.model.parameters())


def test_steps_of_accumulated_batches_are_whole_steps(random_model: Path, tmp_path: Path) -> None:
    """Two batches of four accumulated are a batch of eight."""
    ends = []
    for size, parts in ((8, 1), (4, 2)):
        trainer = adaptive(random_model, tmp_path / str(size), traces=False, max_steps=6, num_train_epochs=2,
                           per_device_train_batch_size=size, gradient_accumulation_steps=parts, eta_l=1.0)  # fmt: skip
        trainer.train()
        ends.append(trainer.estimator.controller)
    np.testing.assert_allclose(ends[0].averages.mean, ends[1].averages.mean, rtol=1e-6)
    assert ends[0].alpha == pytest.approx(ends[1].alpha, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "words", "plain"),
    [
        (lambda w: torch.optim.SGD(w, lr=0.1), "that of SGD: the identity", True),
        (lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9), "that of SGD: the identity", True),
        (lambda w: torch.optim.AdamW(w, lr=0.1), "that of AdamW", False),
        (lambda w: torch.optim.RMSprop(w, lr=0.1), "that of RMSprop", False),
        (lambda w: torch.optim.Adafactor(w, lr=0.1), "that of SGD, for Adafactor has no second moments", True),
    ],
)
def test_metrics_of_optimizers(make, words: str, plain: bool) -> None:
    """Read from the state: what is no diagonal of second moments falls back to SGD's, and says so."""
    weights = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    optimizer = make(weights)
    for _ in range(3):
        for k, weight in enumerate(weights):
            weight.grad = torch.full_like(weight, k + 1.0)
        optimizer.step()
    metric, said = optimizer_metric(optimizer, weights)
    assert said.startswith(words)
    assert (metric is None) == plain
    if words == "that of AdamW":
        np.testing.assert_allclose(metric.detach().numpy(), [1.0] * 6 + [0.5] * 4, rtol=1e-5)


def test_traces_from_a_file(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model, "float64", drift=0.3)
    pairs = both_sets(policy, PROMPTS)
    bank = banks(policy, pairs)
    write_records(tmp_path / "traces.parquet", bank)
    trainer = BVPOTrainer(policy, settings(tmp_path, **ADAPTIVE), pairs, traces=tmp_path)
    known = adaptive(random_model, tmp_path)
    assert trainer.selection == known.selection
    assert len(trainer.selection.train[0].traces) > 0


def test_without_traces_the_bias_is_taken_as_zero_and_that_is_said(
    random_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = adapted(random_model, "float64", drift=0.0)
    trainer = BVPOTrainer(policy, settings(tmp_path, **ADAPTIVE), both_sets(policy, PROMPTS))
    assert "there is no trace bank: the trace gradient's bias E g_t - mu is taken as 0" in caplog.text
    assert trainer.estimator.looks is None
    trainer.train()
    assert trainer.estimator.controller.bias.prompts == 0
    simpo = BVPOTrainer(policy, settings(tmp_path, **ADAPTIVE, loss_type="simpo"), both_sets(policy, PROMPTS))
    assert "not even at the reference for this loss" in simpo.estimator.mu


def test_traces_of_another_model_are_refused(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    pairs = both_sets(policy, PROMPTS)
    traces = [replace(trace, model="another@0123456789ab") for trace in banks(policy, pairs)]
    with pytest.raises(UserError, match="was sampled by"):
        BVPOTrainer(policy, settings(tmp_path, **ADAPTIVE), pairs, traces=traces)


def test_losses_before_and_after_are_of_the_same_pairs(random_model: Path, tmp_path: Path) -> None:
    trainer = adaptive(random_model, tmp_path, traces=False, max_steps=4, learning_rate=1e-2)
    trainer.train()
    after = trainer.same_pairs()
    assert trainer.before["prompts"] == after["prompts"] == PROMPTS
    assert after["trace/loss"] != trainer.before["trace/loss"]
    fixed = adaptive(random_model, tmp_path, traces=False, max_steps=1)
    assert fixed.same_pairs() == trainer.before
