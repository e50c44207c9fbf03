"""Second-order calibration against simulation of the limit that it is derived in, and its estimates against truth."""

import numpy as np
import pytest
from scipy import stats

from bvpo_stats.statistics.calibration import (
    DifferenceSecondOrder,
    DifferenceSkew,
    pair_matrix,
    shrunk,
    tail_quantile,
    u_centred,
    undo_interaction,
)

DIRECTION = np.array([1.0, 0.0, 0.0, 0.0])


def symmetric(scale, seed):
    x = np.random.default_rng(seed).normal(size=(4, 4))
    return scale * (x + x.T)


# Interactions H in units of the linear part's standard deviation, whose unit vector is DIRECTION unless said otherwise.
SHAPES = {
    "one direction": (DIRECTION, np.diag([0.12, 0.0, 0.0, 0.0])),
    "aside": (DIRECTION, np.diag([0.0, 0.2, 0.2, -0.2])),
    "many directions": (np.eye(30)[0], 0.06 * np.eye(30)),
    "mixed signs": (np.array([0.6, 0.8, 0.0, 0.0]), np.diag([0.12, -0.12, 0.08, -0.08])),
    "any": (DIRECTION, symmetric(0.035, 0)),
    "across": (DIRECTION, np.array([[0, 0.09, 0, 0], [0.09, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.0]])),
}


def coverages(name, variance):
    """Of |T'| <= quantile at 95% and of |T'| <= the plain quantile, h1 seen with an error of that variance."""
    direction, h = SHAPES[name]
    draws = np.random.default_rng(1).normal(size=(400_000, len(h)))
    moved = direction + draws @ h
    scale = np.linalg.norm(moved, axis=1)
    half_square = (np.einsum("ij,jk,ik->i", draws, h, draws, optimize=True) - np.trace(h)) / 2
    studentised = (draws @ direction + half_square) / scale
    seen = np.einsum("ij,jk,ik->i", moved, h, moved, optimize=True) / scale**3
    noise = np.array(variance)
    seen = seen + np.sqrt(noise) * np.random.default_rng(2).normal(size=len(seen))
    freed = undo_interaction(studentised, shrunk(seen, noise)[0], 1)  # k12 / sqrt(G) is h1
    # As a sample gives them: seen from where it is, in units of the standard error that it has.
    chain, square = np.sum((moved @ h) ** 2, axis=1) / scale**4, np.sum(h**2) / scale**2
    q = stats.norm.ppf(0.975)
    covered = np.mean(np.abs(freed) <= tail_quantile(q, np.inf, seen, noise, chain, square))
    plain = np.mean(np.abs(freed) <= q)
    return covered, plain


@pytest.mark.parametrize("variance", [0.0, 0.005])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "one direction"])
def test_quantile_is_that_of_the_gaussian_limit(name, variance):
    covered, plain = coverages(name, variance)
    assert abs(covered - 0.95) < 0.003
    if variance == 0:
        assert abs(plain - 0.95) > 0.0025
        assert abs(covered - 0.95) < abs(plain - 0.95) / 2


@pytest.mark.parametrize("variance", [0.0, 0.005])
def test_sets_that_could_be_narrower_are_kept_wide(variance):
    """All in one direction: kappa is far above Efron and Stein's share, which bounds it."""
    assert 0.95 < coverages("one direction", variance)[0] < 0.96


def test_estimates_are_unbiased():
    """Kernel (x.Ay): influences 2 A mean, interactions x'Ay; E psi r r psi and E r^2 in closed form."""
    rng, groups, replicates = np.random.default_rng(2), 12, 6000
    first, second = symmetric(1.0, 3)[:3, :3], symmetric(1.0, 4)[:3, :3]
    mean = np.array([1.0, -0.5, 2.0])
    x = rng.normal(size=(replicates, groups, 3))
    influences = np.stack([2 * x @ (k @ mean) for k in (first, second)], axis=-2)
    interactions = np.stack([u_centred(x @ k @ np.swapaxes(x, 1, 2)) for k in (first, second)], axis=-2)
    found = DifferenceSecondOrder.of(influences, pair_matrix(interactions, groups), np.ones((replicates, groups)))
    for a in (0.0, 0.7, -1.3):
        k = first - a * second
        chain = 4 * (2 * k @ mean) @ k @ k @ (2 * k @ mean) / groups**3
        square = 4 * np.sum(k**2) / (groups * (groups - 1))
        got = np.polynomial.polynomial.polyval(a, found.square.T)
        assert abs(got.mean() - square) < 3.5 * got.std() / np.sqrt(replicates)
        # U-centring takes the mean of the G groups out of every chain: a share of order 1 / G.
        got = np.polynomial.polynomial.polyval(a, found.chain.T)
        assert got.mean() == pytest.approx(chain, rel=4 / groups)


def test_a_difference_is_that_of_its_parts_combined():
    rng = np.random.default_rng(5)
    influences, interactions, sizes = rng.normal(size=(5, 2, 9)), rng.normal(size=(5, 2, 36)), np.full((5, 9), 2.0)
    both = DifferenceSecondOrder.of(influences, pair_matrix(interactions, 9), sizes)
    for a in (-0.7, 0.0, 1.3):
        psi, r = (x[:, :1] - a * x[:, 1:] for x in (influences, interactions))
        one = DifferenceSecondOrder.of(
            np.concatenate([psi, psi], axis=1), pair_matrix(np.concatenate([r, r], axis=1), 9), sizes
        )  # only the coefficients of a^0 matter
        matrix = pair_matrix(r[:, 0], 9)
        whole = np.einsum("rg,rgk,rkh,rh->r", psi[:, 0], matrix, matrix, psi[:, 0])
        whole -= np.einsum("rg,rgk,rkg,rg->r", psi[:, 0], matrix, matrix, psi[:, 0])
        np.testing.assert_allclose(one.chain[:, 0], 4 * whole / (9 * 8 * 7 * 9**3), rtol=1e-9)
        np.testing.assert_allclose(np.polynomial.polynomial.polyval(a, both.chain.T), one.chain[:, 0], rtol=1e-9)
        np.testing.assert_allclose(np.polynomial.polynomial.polyval(a, both.square.T), one.square[:, 0], rtol=1e-9)


def test_without_interactions_the_quantile_stays():
    influences, interactions = np.random.default_rng(6).normal(size=(2, 9)), np.zeros((2, 9, 9))
    second = DifferenceSecondOrder.of(influences, interactions, np.ones(9))
    skew = DifferenceSkew.of(influences, interactions).at(np.array(0.4))
    for variance in (1.0, 0.0):  # the last: nothing varies at all
        assert float(second.quantile(np.array(0.4), np.array(variance), skew, 9, 2.0)) == 2.0


def test_impossible_estimates_are_brought_into_range():
    q, none, skew = 2.0, np.array(0.0), np.array(0.3)
    wild = tail_quantile(q, np.inf, skew, none, np.array(-3.0), none)
    np.testing.assert_allclose(wild, tail_quantile(q, np.inf, skew, none, np.array(0.09), np.array(0.09)))
    assert (tail_quantile(q, np.inf, np.linspace(0, 2, 20), none, np.zeros(20), np.linspace(0, 9, 20)) > 0).all()


def test_fewer_groups_make_the_narrower_set_less_certain():
    nothing, square = np.array(0.0), np.array(0.8)
    many, few = (float(tail_quantile(2.0, df, nothing, nothing, nothing, square)) for df in (1e9, 19))
    assert many == pytest.approx(2 / 1.2)
    # Student's quantile of the same level at the degrees of freedom that are left.
    left = 19 / (1 + 0.4 / 1.2) ** 2
    level = stats.t.cdf(2.0, 19)
    assert few * 1.2 == pytest.approx(stats.t.ppf(level, left), rel=0.01)
