"""The table of alpha's interval under tails, in small: what covers, what is refused, what must fail."""

from dataclasses import replace

import numpy as np
import pytest

from bvpo_stats.lab.acceptance.cells import v_statistics
from bvpo_stats.lab.acceptance.replicates import quick_ratios
from bvpo_stats.lab.acceptance.weights import FLOOR, TAUS, Design, coverage, finite, populations
from bvpo_stats.statistics.estimates import LinearRatio, estimates
from bvpo_stats.statistics.intervals import ratio_sets
from bvpo_stats.statistics.moments import summary_of_arrays

DRAWN = populations(7)


def drawn(name):
    return next(p for p in DRAWN if name in p.name)


@pytest.mark.parametrize(
    ("scale", "spread", "whole"), [("none", 0.0, False), ("log-normal", 0.3, True), ("student", 9.0, False)]
)
def test_the_truth_of_a_population_is_the_mean_of_its_estimates(scale, spread, whole):
    means = np.array([[0.3, 0.05, 0.1], [0.3, 0.2, 0.0], [0.3, 0.0, 0.0]])
    design = Design(means, np.full(12, 1 / 12), 0.3, 0.8, scale, spread, whole).solved(0.4)
    assert design.alpha(1 / 8) == pytest.approx(0.4)
    vectors = design.draw(np.random.default_rng(0), (4000, 20))
    parts = estimates(summary_of_arrays(vectors)).select(0)
    for tau in TAUS:
        top, bottom = parts.numerator(tau), parts.denominator(tau)
        gap = top - design.alpha(tau) * bottom
        assert abs(gap.mean()) < 3.5 * gap.std() / np.sqrt(gap.size)


def test_a_triangle_has_the_inner_products_of_many_dimensions():
    design = Design(np.zeros((3, 3)), np.full(500, 1 / 500), 0.3, 0.0, "none", 0.0, False, 0.5)
    h = [design.draw(np.random.default_rng(k), (2000, 4))["t"] for k in range(2)]
    dots = np.einsum("rd,rd->r", h[0][:, 0], h[0][:, 1])
    assert h[0].shape[-1] == 15
    assert (h[0] ** 2).sum(-1).mean() == pytest.approx(1, abs=0.005)
    assert dots.std() == pytest.approx(1 / np.sqrt(500), rel=0.06)


def test_intervals_cover_where_the_one_before_does_not():
    """Normal gradients: hardly wider than before. A log-normal scale: before 57 to 85%, which fails the table."""
    honest, tails = coverage(drawn("Gaussian, d = 108"), 50, 250, 0), coverage(drawn("sd 1, d = 2000"), 50, 250, 0)
    for line in honest[:2]:
        assert line.passed
        assert line.given > 0.95
        assert line.coverage >= 0.93
        assert line.width < 1.15
    for line in tails:
        assert line.passed
        assert line.before < 0.85
        assert line.given > 0.1
        assert line.n_eff < 6
    assert not any(replace(line, given=1.0, coverage=line.before).passed for line in tails)


@pytest.mark.parametrize(("prompts", "dimension"), [(12, 30), (300, 30), (260, 300)])
@pytest.mark.parametrize("injected", [False, True])
def test_quick_ratios_are_those_of_the_summary(prompts, dimension, injected):
    """Single prompts, groups of them, and groups with sketches: as the command does it, in fewer products."""
    means = np.zeros((3, 3))
    means[:, 0], means[1, 1] = 0.3, 0.2
    design = Design(means, np.full(dimension, 1 / dimension), 0.3, 0.8, "log-normal", 0.5, True, 0.4)
    vectors = design.draw(np.random.default_rng(prompts), (2, prompts))
    if prompts == 12:
        del vectors["m"]  # the reference point: t stands for it
    summary = summary_of_arrays(vectors)
    if injected:
        summary = v_statistics(summary)
    for tau, found in zip(TAUS, quick_ratios(vectors, TAUS, injected=injected), strict=True):
        wanted = LinearRatio.alpha(summary, tau)
        pairs = [(found, wanted)] if wanted.alone is None else [(found, wanted), (found.alone, wanted.alone)]
        for one, other in pairs:
            for name in ("numerator", "denominator", "group_sizes"):
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(found.norms, wanted.norms, rtol=1e-9)
        for own, other in zip(found.interactions, wanted.interactions, strict=True):
            np.testing.assert_allclose(own, other, atol=1e-10)
        np.testing.assert_allclose(ratio_sets(found).low, ratio_sets(wanted).low, rtol=1e-6)


def test_injected_v_statistics_fail_the_table():
    population = drawn("Gaussian, d = 5000")
    upright = coverage(population, 20, 200, 0)
    injected = coverage(population, 20, 200, 0, injected=True)
    assert upright[-1].passed
    assert not injected[-1].passed
    assert injected[-1].coverage < FLOOR < upright[-1].coverage


def test_given_vectors_drawn_with_repetition_know_their_truth():
    rng = np.random.default_rng(0)
    vectors = {name: rng.normal(size=(30, 5)) for name in "te"}
    population = finite("thirty", vectors)
    large = population.draw(rng, (1, 40_000))
    found = estimates(summary_of_arrays({k: v[0] for k, v in large.items()}, groups=20)).select(0)
    assert found.numerator(1.0) / found.denominator(1.0) == pytest.approx(population.truth[0], abs=0.02)
