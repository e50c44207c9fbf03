"""Controllers and rules against a population whose moments are known, and against what must go wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.estimates import estimates
from bvpo_stats.statistics.moments import summary_of_arrays
from bvpo_stats.training import (
    AdaptiveController,
    AdaptiveOptions,
    FixedController,
    Observation,
    StepProducts,
    StepSize,
    from_state,
    make_controller,
)
from bvpo_stats.training.alpha import RULES, AlphaStream, Lag, StepMeans
from bvpo_stats.training.alpha.lagged import KEPT_STEPS, ProductAverages
from bvpo_stats.training.alpha.rules.base import Parts, Seen

D, B = 6, 8
MEAN_T, MEAN_E, MU = (np.eye(D)[0] * s for s in (1.0, 0.2, 0.9))
SPREAD_T, SPREAD_E = 1.0, 0.3
H, C = MEAN_T - MEAN_E, MEAN_T - MU
P1, Q1 = D * SPREAD_E**2, D * (SPREAD_T**2 + SPREAD_E**2)


def truth(tau, c_h=0.0):
    return (H @ H - c_h + tau * P1) / (H @ H + tau * Q1)


def means(rng, shape=(), n=B):
    """t_k and e_k of a step of n prompts."""
    t = MEAN_T + SPREAD_T * rng.normal(size=(*shape, D)) / np.sqrt(n)
    return t, MEAN_E + SPREAD_E * rng.normal(size=(*shape, D)) / np.sqrt(n)


def stream(rng, steps, *, shape=(), rule="theorem4", eta_l=1.0, n=B, per_epoch=None, **options):
    """Intervals are formed from the last step on: they take most of the time, and no decision depends on them."""
    asked = AdaptiveOptions(rule=rule, **options)
    found = AlphaStream(AdaptiveController.start(replace(asked, level=None), shape), StepSize(eta_l=eta_l), n)
    for k in range(steps):
        if k == steps - 1:
            found.controller = replace(found.controller, options=asked)
        t, e = means(rng, shape, n)
        epoch = 0 if per_epoch is None else k // per_epoch
        found.observe(StepMeans(k, n, t - e, e, epoch), None, np.ones(shape) if shape else 1.0, progress=k / steps)
    return found


def test_averages_are_unbiased_and_their_covariance_is_that_of_replicates() -> None:
    """400 runs at once: means of all six products against the truth, spreads against what each run says of itself."""
    averages = stream(np.random.default_rng(0), 30, shape=(400,), rule="direction").controller.averages
    wanted = [H @ H + Q1 / B, MEAN_E @ H - P1 / B, MEAN_E @ MEAN_E + P1 / B, H @ H, MEAN_E @ H, MEAN_E @ MEAN_E]
    z = (averages.mean.mean(axis=0) - wanted) / (averages.mean.std(axis=0) / 20)
    assert np.abs(z).max() < 3.5
    said = np.einsum("nii->ni", averages.covariance(2.0)).mean(axis=0)
    ratio = said / averages.mean.var(axis=0)
    assert (np.abs(ratio[:3] - 1) < 0.35).all(), ratio
    assert ((ratio[3:] > 0.5) & (ratio[3:] < 3)).all(), ratio  # SHARED stands between its two regimes


def test_a_step_times_itself_is_biased_where_lagged_products_are_not() -> None:
    """The injected mistake: norm(hbar)^2, or within-step products taken for norm(h)^2."""
    averages = stream(np.random.default_rng(1), 30, shape=(400,)).controller.averages
    for place, biased in ((3, False), (0, True)):
        values = averages.mean[:, place]
        assert (abs(values.mean() - H @ H) > 6 * values.std() / 20) == biased


@pytest.mark.parametrize("eta_l", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("n", [1, 8])
def test_alpha_tends_to_the_truth_at_the_step_s_own_tau(eta_l, n) -> None:
    """Also with a batch of one prompt. The nominal 95% intervals cover .90 to .95 in this population of one signal."""
    found = stream(np.random.default_rng(2), 200, shape=(400,), eta_l=eta_l, n=n).controller.decision
    assert np.abs(found.alpha.mean() - truth(eta_l / n)) < 0.03
    assert np.mean((found.low <= truth(eta_l / n)) & (truth(eta_l / n) <= found.high)) >= 0.88


def test_a_prompt_does_not_meet_its_own_gradient() -> None:
    """The same 40 prompts in every epoch: with a window over epochs norm(h)^2 would take their own squares in."""
    rng, noise = np.random.default_rng(3), np.random.default_rng(4).normal(size=(300, 40, D))
    h = H + noise - noise.mean(axis=1, keepdims=True)  # the mean over all prompts is H exactly
    right = H @ H - (noise.var(axis=1).sum(axis=1) / 39).mean()  # over pairs of different prompts
    ends = {}
    for across in (False, True):
        averages, lag = ProductAverages.empty((300,)), Lag()
        for k in range(30):
            if k % 5 == 0:
                order = rng.permutation(40)
            step = h[:, order[k % 5 * 8 : k % 5 * 8 + 8]].mean(axis=1)
            lag = lag.of_epoch(0 if across else k // 5)
            averages = averages.add(lag.products(8, step, step * 0.0))
            lag = lag.add(8, step)
        values = averages.mean[:, 3]
        ends[across] = (values.mean() - right) / (values.std() / np.sqrt(300))
    assert abs(ends[False]) < 3.5
    assert ends[True] > 5


def test_an_epoch_of_one_step_says_so() -> None:
    found = stream(np.random.default_rng(5), 12, per_epoch=1).controller
    assert found.alpha == 0.5
    assert found.record.why == "theorem4: 0 steps with earlier ones of their epoch are too few to estimate from"
    short = stream(np.random.default_rng(5), 12, per_epoch=2).controller
    assert short.alpha != 0.5


def test_steps_of_unequal_size() -> None:
    rng, averages, lag = np.random.default_rng(6), ProductAverages.empty((500,)), Lag()
    for k in range(24):
        n = (8, 8, 3)[k % 3]
        t, e = means(rng, (500,), n)
        averages, lag = averages.add(lag.products(n, t - e, e)), lag.add(n, t - e)
    parts = Parts.of(np.concatenate([averages.mean, np.zeros((500, 2))], axis=1), averages.batch)
    for values, wanted in ((parts.Q1, Q1), (parts.P1, P1), (parts.h_sq, H @ H)):
        assert abs(values.mean() - wanted) < 3.5 * values.std() / np.sqrt(500)


def test_noise_moves_alpha_a_little_and_signal_all_the_way() -> None:
    """No threshold: the shrunk estimate nears the plain one as steps go by, and no data leave the prior."""
    assert stream(np.random.default_rng(7), 2).controller.alpha == 0.5
    few, many = (stream(np.random.default_rng(7), n, shape=(300,)).controller.decision for n in (5, 300))
    for decision, least, most in ((few, 0.2, 0.99), (many, 0.97, 1.0)):
        inside = (decision.estimate > 0) & (decision.estimate < 1)
        moved = np.median((decision.alpha[inside] - 0.5) / (decision.estimate[inside] - 0.5))
        assert least < moved <= most + 1e-9, moved


def test_influences_of_steps_are_the_spread_that_the_covariance_has() -> None:
    averages = stream(np.random.default_rng(12), 40).controller.averages
    share = averages.squares[3, 3] / averages.weights[3] ** 2
    psi = averages.influences
    assert psi.shape == (40, 6)
    np.testing.assert_allclose(psi.T @ psi / (1 - share), averages.covariance(1.0), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(psi.sum(axis=0), 0, atol=1e-12)
    long = stream(np.random.default_rng(12), KEPT_STEPS + 5).controller.averages
    assert long.influences.shape == (KEPT_STEPS, 6)
    assert json.loads(json.dumps(long.to_state()))["recent"] == long.recent.tolist()


def test_too_few_effective_steps_give_no_interval() -> None:
    """The same refusal as of single prompts: one loud step, or only three steps."""
    running = stream(np.random.default_rng(13), 60)
    decision = running.controller.decision
    assert decision.n_eff > 8
    assert decision.largest < 0.3
    assert 0 < decision.low < decision.high < 1
    t, e = means(np.random.default_rng(14))
    running.observe(StepMeans(60, B, 400 * (t - e), 400 * e), None, 1.0, progress=1.0)
    loud = running.controller.decision
    assert loud.n_eff < 4 < decision.n_eff
    assert loud.largest > 0.5 > decision.largest
    assert (loud.low, loud.high) == (0.0, 1.0)
    assert running.controller.record.n_eff == pytest.approx(float(loud.n_eff))
    early = stream(np.random.default_rng(13), 4).controller.decision
    assert early.known
    assert early.n_eff < 4
    assert (early.low, early.high) == (0.0, 1.0)


def test_metric_weighs_the_products() -> None:
    rng, metric = np.random.default_rng(8), np.linspace(0.5, 4, D)
    plain, scaled = Lag(), Lag()
    for _ in range(3):
        t, e = means(rng)
        one = plain.products(B, t - e, e, metric)
        other = scaled.products(B, np.sqrt(metric) * (t - e), np.sqrt(metric) * e)
        np.testing.assert_allclose(one.within, other.within, rtol=1e-12)
        np.testing.assert_allclose(one.lagged, other.lagged, rtol=1e-12)
        plain, scaled = plain.add(B, t - e, e), scaled.add(B, np.sqrt(metric) * (t - e), np.sqrt(metric) * e)


def seen(vectors, batch_size, eta_l, **changes):
    """What a rule would see if a sample's moments were the truth."""
    p = estimates(summary_of_arrays(vectors)).select(0)
    hh, e_h = p.trace_sq - 2 * p.trace_dot_empty + p.empty_sq, p.trace_dot_empty - p.empty_sq
    within = (hh + p.Q1 / B, e_h - p.P1 / B, p.empty_sq + p.var_empty / B)
    c_e = p.trace_dot_empty - p.empty_dot_marginal
    c_h = p.trace_sq - p.trace_dot_marginal - c_e
    values = {
        "statistics": np.array([*within, hh, e_h, p.empty_sq, c_h, c_e]),
        "covariance": np.zeros((8, 8)),
        "widest": np.zeros((8, 8)),
    }
    values |= {"effective": 1e9, "products": 1000, "batch": float(B), "batch_size": batch_size, "progress": 0.25}
    values |= {"eta_l": np.asarray(eta_l), "prior": 0.5, "alpha": np.asarray(0.5), "latest": None}
    return Seen(**(values | changes)), p


@pytest.fixture(scope="module")
def sample():
    rng = np.random.default_rng(9)
    noise = rng.normal(size=(4000, D))
    vectors = {"t": MEAN_T + noise, "e": MEAN_E + SPREAD_E * rng.normal(size=(4000, D))}
    return vectors | {"m": MU + 0.5 * noise}


def test_rules_are_their_formulas(sample) -> None:
    """On exact moments: Theorem 4, alpha_J, the direction answer and the variance answer of `bvpo_stats.statistics`."""
    from bvpo_stats.statistics.alpha import direction_alpha

    look, p = seen(sample, 32.0, 0.4)
    expected = {
        "theorem4": p.numerator(0.4 / 32) / p.denominator(0.4 / 32),
        "descent": np.divide(*p.alpha_j_parts(0.4, 32.0)),
        "direction": direction_alpha(summary_of_arrays(sample), batch_size=32).unclipped,
    }
    expected["rising"] = expected["direction"] / 2
    for name, value in expected.items():
        decision = RULES[name].decide(look, 0.95)
        assert float(decision.estimate) == pytest.approx(float(value), rel=1e-6), name
    start = float(np.clip(expected["direction"], 0, 1)) / 2
    assert float(RULES["rising"].decide(look, 0.95).alpha) == pytest.approx(start + 0.25 * (1 - start), rel=1e-6)
    beyond, p = seen(sample, 32.0, 1.7)
    np.testing.assert_allclose(
        RULES["descent"].decide(beyond, 0.95).estimate, RULES["theorem4"].decide(beyond, 0.95).estimate, rtol=1e-9
    )


def test_direction_does_not_depend_on_eta_l(sample) -> None:
    found = [float(RULES["direction"].decide(seen(sample, 32.0, x)[0], 0.95).alpha) for x in (0.0, 0.01, 1.0)]
    assert found[0] == found[1] == found[2]


def test_hypergradient_follows_the_next_gradient(sample) -> None:
    rule = RULES["hypergradient"]
    ahead = seen(sample, 8.0, 1.0, latest=np.array([1.0, 0, 0, 0.8, 0.3, 0]))[0]
    back = replace(ahead, latest=np.array([1.0, 0, 0, -0.8, -0.3, 0]))
    assert float(rule.decide(ahead, 0.95).alpha) > 0.5 > float(rule.decide(back, 0.95).alpha)
    assert abs(float(rule.decide(ahead, 0.95).alpha) - 0.5) <= 0.06 + 1e-12


def test_rising_ends_at_the_trace_gradient() -> None:
    found = AdaptiveController.start(AdaptiveOptions(rule="rising"))
    assert found.alpha == 0.25
    last = found.update(Observation(99, 8, progress=1.0))
    assert last.alpha == 1.0


def test_a_bias_that_is_seen_lowers_alpha() -> None:
    controller = stream(np.random.default_rng(10), 100).controller
    rng = np.random.default_rng(11)
    x = np.stack([(C @ H) + 0.1 * rng.normal(size=64), np.zeros(64)], axis=1)
    informed = controller.update(Observation(100, B, 1.0, None, (64, x.sum(axis=0), x.T @ x)))
    assert informed.bias.mean[0] == pytest.approx(C @ H, abs=0.05)
    assert informed.alpha < controller.alpha - 0.03
    assert informed.record.bias_prompts == 64
    assert informed.record.c_h == pytest.approx(C @ H, abs=0.05)


def test_products_that_are_not_finite_are_left_out() -> None:
    controller = stream(np.random.default_rng(12), 20).controller
    broken = StepProducts(8, np.array([np.inf, 0, 0]), np.zeros(3), 8.0)
    assert controller.update(Observation(20, 8, 1.0, broken)).alpha == controller.alpha


@pytest.mark.parametrize("alpha", ["adaptive", 0.25, "0:0.2,100:0.8", "0%:0.5,100%:1"])
@pytest.mark.parametrize("rule", ["rising", "hypergradient"])
def test_state_goes_through_json_and_on_bit_for_bit(alpha, rule) -> None:
    def run(first, steps, found):
        for k in range(first, first + steps):
            t, e = means(np.random.default_rng([13, k]))
            found.observe(StepMeans(k, B, t - e, e, k // 7), None, 1 / (1 + k), progress=k / 20)
            if found.direction is not None:
                found.measured(np.asarray(0.3 + k))
        return found

    def new():
        return AlphaStream(make_controller(alpha, rule=rule), StepSize(auto=True), B)

    whole = run(0, 12, new())
    resumed = run(0, 3, new())  # a measurement is pending
    state = json.loads(json.dumps(resumed.to_state()))
    again = new()
    again.restore(from_state(state["controller"]), state, resumed.vectors())
    again = run(3, 9, again)
    assert again.controller.alpha == whole.controller.alpha
    assert again.controller.record == whole.controller.record
    assert again.to_state() == whole.to_state()


def test_eta_l_is_measured_and_follows_the_schedule() -> None:
    """v' H v over u' P u with H and P known, whatever the noise draw's size."""
    rng, hessian, metric = np.random.default_rng(14), np.diag([3.0, 1, 1, 0, 0, 0]), np.array([2.0, 1, 1, 1, 1, 1])
    found = AlphaStream(AdaptiveController.start(AdaptiveOptions(rule="theorem4")), StepSize(auto=True, peak=0.1), B)
    assert found.step_size.at(0.1) == 1.0
    for k in range(2000):
        t, e = means(rng)
        found.observe(StepMeans(k, B, t - e, e), metric, 0.1)
        if found.direction is not None:
            found.measured(np.asarray(found.direction @ hessian @ found.direction))
    exact = (metric**2 * np.diag(hessian)).sum() / metric.sum()
    assert found.step_size.measurements == 42
    assert float(found.step_size.smoothness) == pytest.approx(exact, rel=0.6)
    assert float(found.step_size.at(0.05)) == pytest.approx(0.5 * float(found.step_size.at(0.1)))
    before = found.step_size
    assert before.measured(np.asarray(np.nan), np.asarray(1.0)) is before


def test_log_has_every_number() -> None:
    record = stream(np.random.default_rng(15), 20, per_epoch=10).controller.record
    log = replace(record, time_share=0.02).log()
    assert {"alpha", "alpha/low", "alpha/high", "alpha/h_sq", "alpha/P1", "alpha/Q1", "alpha/eta_l", "alpha/tau",
            "alpha/prompts", "alpha/bias_prompts", "alpha/time_share"} <= set(log)  # fmt: skip
    assert all(np.isfinite(list(log.values())))


def test_a_schedule_in_percent_follows_the_run() -> None:
    schedule = FixedController.of("0%:0.5,100%:1")
    alphas = [schedule.alpha]
    for k in range(4):
        schedule = schedule.update(Observation(k, 8, progress=(k + 1) / 4))
        alphas.append(schedule.alpha)
    assert alphas == [0.5, 0.625, 0.75, 0.875, 1.0]
    with pytest.raises(UserError, match="known length"):
        schedule.update(Observation(4, 8))
    for wrong in ("0%:0.5,101%:1", "0:0.5,100%:1", "50%:0.5,20%:1", "0%:0.5,100%:2"):
        with pytest.raises(UserError):
            FixedController.of(wrong)


def test_schedule_and_step_size() -> None:
    schedule = FixedController.of("2:0.0,4:1.0")
    alphas = [schedule.alpha]
    for k in range(5):
        schedule = schedule.update(Observation(k, 8))
        alphas.append(schedule.alpha)
    assert alphas == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    assert StepSize(eta_l=1.0, peak=2e-5).at(1e-5) == 0.5
    assert FixedController.of(0.3).record.why == "fixed"


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_controller(1.5),
        lambda: make_controller("sometimes"),
        lambda: make_controller("5:0.2,1:0.3"),
        lambda: make_controller("0:0.2,1:1.3"),
        lambda: AdaptiveOptions(prior=-0.1),
        lambda: AdaptiveOptions(level=1.0),
        lambda: AdaptiveOptions(rule="best"),
        lambda: StepSize(eta_l=0.0),
        lambda: from_state({"kind": "oracle"}),
    ],
)
def test_bad_input_is_a_user_error(make) -> None:
    with pytest.raises(UserError):
        make()
