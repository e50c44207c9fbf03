"""Every number of the report, over repeated samples, against the oracle's exact value.

The truth is summed over the whole population of gradients, written out in full dimension, so that it can be had per
layer and in Adam's metric. A row's mean over the samples must lie within 3.5 of its own standard errors, those that the
report's intervals are made of, of the truth.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest

from bvpo_stats.gradients.engine import block_of
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.lab.oracle import Oracle, draw_examples, example_gradients
from bvpo_stats.lab.oracle.exact import DPO, marginal_responses, pair_gradients, trace_responses
from bvpo_stats.statistics.alpha import layer_alphas
from bvpo_stats.statistics.intervals import t_quantile
from bvpo_stats.statistics.moments import Moments
from bvpo_stats.studies.alpha_star.report import AlphaReport, AlphaSettings
from bvpo_stats.studies.alpha_star.run import AlphaOptions
from tests.studies.alpha_inputs import estimate, records, small_oracle

Z = 3.5
SETTINGS = AlphaSettings(batch_size=16, eta_l=0.5)
TAU = SETTINGS.eta_l / SETTINGS.batch_size


@dataclass(frozen=True)
class Truth:
    """Means and second moments of t, e and m in a metric W (diagonal; zeros leave parameters out)."""

    bias_t: float
    bias_e: float
    bias_cross: float
    var_t: float
    var_e: float
    var_te: float
    mu_sq: float
    mu_t: float
    mu_e: float
    trace_part: float

    def alpha(self, tau: float) -> float:
        return (self.bias_e - self.bias_cross + tau * (self.var_e - self.var_te)) / self.A(tau)

    def A(self, tau: float) -> float:
        bias = self.bias_t + self.bias_e - 2 * self.bias_cross
        return bias + tau * (self.var_t + self.var_e - 2 * self.var_te)

    def error(self, a: float, tau: float) -> float:
        b = 1 - a
        bias = a * a * self.bias_t + 2 * a * b * self.bias_cross + b * b * self.bias_e
        return bias + tau * (a * a * self.var_t + 2 * a * b * self.var_te + b * b * self.var_e)


class Population:
    """All gradients of an oracle's population, with their probabilities."""

    def __init__(self, oracle: Oracle) -> None:
        responses, marginals = trace_responses(oracle.table), marginal_responses(oracle.table)
        posterior, prompts = oracle.table.sampling.posterior, len(oracle.pair_law)
        self.prompts = prompts
        self.t: list[tuple[int, float, np.ndarray, np.ndarray]] = []  # prompt, P(answers), P(traces), gradients
        self.m: list[tuple[float, np.ndarray]] = []
        self.e: list[tuple[int, float, np.ndarray]] = []
        for x, a, b in np.argwhere(oracle.pair_law > 0).tolist():
            law = oracle.pair_law[x, a, b]
            plus, minus = responses[x, :, a][:, None], responses[x, :, b][None, :]
            shape = np.broadcast_shapes(plus.log_prob.shape, minus.log_prob.shape)
            grid = np.indices(shape).reshape(2, -1)
            gradients = pair_gradients(DPO, responses[x, grid[0], a], responses[x, grid[1], b])[0]
            weights = posterior[x, grid[0], a] * posterior[x, grid[1], b]
            self.t.append((x, law, weights, gradients))
            self.m.append((law / prompts, pair_gradients(DPO, marginals[x, [a]], marginals[x, [b]])[0][0]))
        for x, a, b in np.argwhere(oracle.empty_pair_law > 0).tolist():
            gradient = pair_gradients(DPO, responses[x, 0, [a]], responses[x, 0, [b]])[0][0]
            self.e.append((x, oracle.empty_pair_law[x, a, b], gradient))

    def truth(self, W: np.ndarray) -> Truth:
        n = self.prompts
        given_t, given_e = (np.zeros((n, len(W))) for _ in range(2))
        square_t = square_e = trace_part = 0.0
        for x, law, weights, gradients in self.t:
            mean, squares = weights @ gradients, weights @ ((gradients**2) @ W)
            given_t[x] += law * mean
            square_t += law * squares / n
            trace_part += law * (squares - (mean**2) @ W) / n
        for x, law, gradient in self.e:
            given_e[x] += law * gradient
            square_e += law * ((gradient**2) @ W) / n
        mu = sum(weight * gradient for weight, gradient in self.m)
        t, e = given_t.mean(axis=0), given_e.mean(axis=0)
        product_te = float(np.sum((given_t * given_e) @ W)) / n

        def dot(u: np.ndarray, v: np.ndarray) -> float:
            return float((u * v) @ W)

        return Truth(
            bias_t=dot(t - mu, t - mu),
            bias_e=dot(e - mu, e - mu),
            bias_cross=dot(t - mu, e - mu),
            var_t=square_t - dot(t, t),
            var_e=square_e - dot(e, e),
            var_te=product_te - dot(t, e),
            mu_sq=dot(mu, mu),
            mu_t=dot(mu, t),
            mu_e=dot(mu, e),
            trace_part=trace_part,
        )


def direction(truth: Truth) -> float:
    """c_t / (c_t + c_e) for c = M^-1 v; the length of a step is free, so tau is 1 / B."""
    tau = 1 / SETTINGS.batch_size
    tt = truth.bias_t + 2 * truth.mu_t - truth.mu_sq + tau * truth.var_t  # norm(E t)^2 = norm(b_t)^2 + 2 mu.E t - mu^2
    ee = truth.bias_e + 2 * truth.mu_e - truth.mu_sq + tau * truth.var_e
    te = truth.bias_cross + truth.mu_t + truth.mu_e - truth.mu_sq + tau * truth.var_te
    c = np.linalg.solve([[tt, te], [te, ee]], [truth.mu_t, truth.mu_e])
    return float(c[0] / c.sum())


def block_sizes(oracle: Oracle) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, part in oracle.blocks.items():
        sizes[block_of(name)] = sizes.get(block_of(name), 0) + part.stop - part.start
    return sizes


def masks(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Block to the metric that leaves the other blocks out."""
    owner = np.repeat(list(sizes), list(sizes.values()))
    return {block: (owner == block).astype(float) for block in sizes}


def expected(population: Population, sizes: dict[str, int], metric: np.ndarray) -> dict[str, tuple[float, float]]:
    """Row to (exact value, allowance for what fitting a weight to the same sample gains, to be multiplied by 1/N)."""
    plain = population.truth(np.ones(len(metric)))
    tau, rho = TAU, SETTINGS.eta_l
    star = plain.alpha(tau)
    h_mu, h_e = plain.mu_t - plain.mu_e, plain.bias_cross - plain.bias_e + plain.mu_t - plain.mu_e
    h_sq = plain.bias_t + plain.bias_e - 2 * plain.bias_cross
    noise = plain.var_t + plain.var_e - 2 * plain.var_te
    # E e . h = (b_e + mu) . (b_t - b_e), and b_t - b_e = h
    alpha_j = (h_mu / rho - h_e + (plain.var_e - plain.var_te) / SETTINGS.batch_size) / (
        h_sq + noise / SETTINGS.batch_size
    )
    second = plain.bias_t + 2 * plain.mu_t - plain.mu_sq + tau * plain.var_t
    rows = {
        "alpha_star": star,
        "alpha_var": (plain.var_e - plain.var_te) / noise,
        "alpha_j": alpha_j,
        "alpha_direction": direction(plain),
        "alpha_adam": population.truth(metric).alpha(tau),
        "mse.trace": plain.error(1, tau),
        "mse.empty": plain.error(0, tau),
        "mse.half": plain.error(0.5, tau),
        "mse.zero": plain.mu_sq,
        "mse.alpha_star": plain.error(min(1.0, max(0.0, star)), tau),
        "mse.shrunk_trace": plain.mu_sq - plain.mu_t**2 / second,
        "bias_sq.trace": plain.bias_t,
        "bias_sq.empty": plain.bias_e,
        "bias_sq.cross": plain.bias_cross,
        "variance.trace": plain.var_t,
        "variance.empty": plain.var_e,
        "variance.cross": plain.var_te,
        "variance.trace_sampling": plain.trace_part,
        "trace_sampling_share": plain.trace_part / plain.var_t,
    }
    for block, mask in masks(sizes).items():
        part = population.truth(mask)
        rows[f"layer.{block}"], rows[f"curvature.{block}"] = part.alpha(tau), part.A(tau)
    for point in np.linspace(0, 1, 41):
        rows[f"parabola.{point:.3f}"] = plain.error(point, tau)
    return rows | {"tau": plain}  # type: ignore[dict-item]


def found(report: AlphaReport) -> dict[str, tuple[float, float | None]]:
    """Row to (value, standard error), where the report's interval tells one."""
    q = t_quantile(report.level, report.n_groups)
    rows: dict[str, tuple[float, float | None]] = {}
    for name in ("alpha_star", "alpha_var", "alpha_j", "alpha_direction", "alpha_adam", "trace_sampling_share"):
        weight = getattr(report, name)
        if weight is not None and weight.unclipped_low is not None:
            rows[name] = weight.unclipped, (weight.unclipped_high - weight.unclipped_low) / (2 * q)
    for part in ("mse", "bias_sq", "variance"):
        for name, value in getattr(report, part).items():
            rows[f"{part}.{name}"] = value, report.uncertainty[part][name].standard_error
    for layer in report.layers:
        rows[f"layer.{layer.block}"] = layer.alpha, (layer.high - layer.low) / (2 * q)
        rows[f"curvature.{layer.block}"] = layer.curvature, None
    for alpha, value, low, high in zip(*report.parabola.values(), strict=True):
        rows[f"parabola.{alpha:.3f}"] = value, (high - low) / (2 * q)
    for point in report.curve:
        rows[f"curve/{point.eta_l}/{point.batch_size}"] = point.alpha, (point.high - point.low) / (2 * q)
    return rows


def samples(oracle: Oracle, seeds: range, prompts: int, stream: StreamOptions) -> list[AlphaReport]:
    options = AlphaOptions(stream=stream, settings=SETTINGS, second_moments=second_moments(oracle))
    reports = []
    for seed in seeds:
        pairs, traces = records(oracle, prompts, seed)
        reports.append(estimate(oracle.policy, pairs, traces=traces, options=options))
    return reports


def second_moments(oracle: Oracle) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {name: rng.uniform(0.01, 1.0, part.stop - part.start) for name, part in oracle.blocks.items()}


def check(oracle: Oracle, reports: list[AlphaReport]) -> int:
    """Compares every row; returns how many there were."""
    moments = np.concatenate(list(second_moments(oracle).values()))
    truth = expected(Population(oracle), block_sizes(oracle), 1 / (np.sqrt(moments) + 1e-8))
    plain = truth.pop("tau")
    rows, n = [found(report) for report in reports], len(reports)
    star_error = np.mean([row["alpha_star"][1] ** 2 for row in rows])
    compared = 0
    for name in sorted({name for row in rows for name in row}):
        if name.startswith("curve/"):
            _, eta_l, size = name.split("/")
            exact = min(1.0, max(0.0, plain.alpha(float(eta_l) / float(size))))
        elif name in truth:
            exact = truth[name]
        else:
            continue
        values = np.array([row[name][0] for row in rows if name in row])
        errors = [row[name][1] for row in rows if name in row]
        spread = values.std(ddof=1) if None in errors else np.sqrt(np.mean(np.square(errors)))
        allowed = Z * spread / np.sqrt(len(values)) + 1e-9 * abs(exact) + 1e-15
        if name in ("mse.alpha_star", "mse.shrunk_trace"):  # weights fitted to the same sample are slightly too good
            allowed += plain.A(TAU) * star_error
        assert abs(values.mean() - exact) <= allowed, (name, values.mean(), exact, allowed, n)
        compared += 1
    return compared


@functools.cache
def reports_of(drift: float) -> list[AlphaReport]:
    """Six samples of the oracle at a drift."""
    return samples(small_oracle(drift=drift), range(6), 100, StreamOptions(half_splits=True))


@pytest.mark.parametrize("drift", [0.0, 0.03])
def test_every_row_is_the_oracles(drift):
    """At theta_ref mu is E g_t; off it, from posterior traces, whose bias (drift / K) drowns in the samples' error."""
    reports = reports_of(drift)
    assert {report.marginal.method for report in reports} == {"reference-point" if drift == 0 else "posterior"}
    assert check(small_oracle(drift=drift), reports) >= 80


def test_the_comparison_sees_a_wrong_row():
    """The same reports against the truth of another population: the check must fail."""
    with pytest.raises(AssertionError):
        check(small_oracle(temperature=0.6), reports_of(0.0))


def test_layer_gain_is_the_oracles():
    """A square, so skewed: one sample's error says little, and the mean over 40 samples takes draws from tables."""
    oracle = small_oracle()
    population, sizes = Population(oracle), block_sizes(oracle)
    whole = population.truth(np.ones(sum(sizes.values()))).alpha(TAU)
    parts = [population.truth(mask) for mask in masks(sizes).values()]
    exact = sum(part.A(TAU) * (part.alpha(TAU) - whole) ** 2 for part in parts)
    cuts = np.cumsum(list(sizes.values()))[:-1]
    values = []
    for seed in range(40):
        draws = draw_examples(oracle, 400, np.random.default_rng(seed))
        t, e, _ = (dict(zip(sizes, np.split(x, cuts, axis=1), strict=True)) for x in example_gradients(oracle, draws))
        summary = Moments.init(("t", "e"), tuple(sizes)).update({"t": t, "e": e}, list(range(400))).finalize()
        gain = layer_alphas(summary, batch_size=SETTINGS.batch_size, eta_l=SETTINGS.eta_l).gain
        values.append(float(gain.value))
    assert abs(np.mean(values) - exact) <= Z * np.std(values, ddof=1) / 40**0.5
    assert np.mean(values) > Z * np.std(values, ddof=1) / 40**0.5  # and it is told from 0
