"""Coverage of the interval of alpha where prompts differ in size, in dimension and in their number of pairs.

A prompt's gradients are means plus noise of a spectrum, times a scale of the prompt's own (on the noise alone, or on
all). How far the biases, the noise that t and e share and alpha lie from each other is drawn, so that the answer of
biases and the answer of variances differ: then influences follow the scale, which is what makes intervals miss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float
from scipy import optimize

from bvpo_stats.lab.acceptance.cells import TAUS
from bvpo_stats.lab.acceptance.replicates import Sample, quick_ratios
from bvpo_stats.statistics.calibration import Mask
from bvpo_stats.statistics.estimates import LinearRatio
from bvpo_stats.statistics.intervals import BOUNDED, RatioTest, Tails, ratio_sets, t_quantile
from bvpo_stats.statistics.moments import MOST_SINGLE_PROMPTS, Array, summary_of_arrays

FLOOR = 0.92
"""Least coverage of the intervals that are given."""
COUNTED = 0.1
"""Share of samples with an interval from which a cell is judged by them alone; below, the chance of being misled is."""
_NUMBERS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class WeightPopulation:
    """Prompts to draw from.

    Attributes:
        name: In words.
        draw: From a generator and a shape ``(R, N)``, vectors ``[R, N, d]`` by member.
        truth: alpha_unc at each of `TAUS`.
        honest: Whether the interval before this one holds here, so that widths are compared.
        pairs: Whether prompts have 1 to 8 pairs (``[R, N, 8, d]`` is drawn, and a number of them kept).
    """

    name: str
    draw: Callable[[np.random.Generator, tuple[int, int]], Sample]
    truth: tuple[float, ...]
    honest: bool = False
    pairs: bool = False


@dataclass(frozen=True)
class Design:
    """Gradients ``mean + scale noise``: ``t = E t + s z``, ``e = E e + s (c z + g z')``, ``m = mu + s (k z + l z'')``.

    Attributes:
        means: E t, E e and mu, ``[3, 3]``, in the first three coordinates.
        variances: Of the noise by coordinate, ``[d]``, summing to 1.
        own: g.
        shared: k: 0, or the share of the traces of t in m.
        scale: ``none``, ``log-normal`` or ``student``.
        spread: Standard deviation of the log, or degrees of freedom.
        whole: Whether the scale multiplies the means too.
        common: c, found so that alpha has the wanted value at tau = 1/8.
    """

    means: Array
    variances: Array
    own: float
    shared: float
    scale: str
    spread: float
    whole: bool
    common: float = 0.0

    def scale_moments(self) -> tuple[float, float]:
        """E s and E s^2."""
        if self.scale == "log-normal":
            return math.exp(self.spread**2 / 2), math.exp(2 * self.spread**2)
        if self.scale == "student":
            f = self.spread
            return math.sqrt(f / 2) * math.gamma((f - 1) / 2) / math.gamma(f / 2), f / (f - 2)
        return 1.0, 1.0

    def alpha(self, tau: float) -> float:
        """alpha_unc, exactly."""
        first, second = self.scale_moments()
        raised, extra = (first**2, second - first**2) if self.whole else (1.0, 0.0)
        t, e, m = self.means
        h, c, g = t - e, self.common, self.own
        P0, Q0 = raised * ((e - m) @ (e - m) - (t - m) @ (e - m)), raised * (h @ h)
        P1 = second * (c * c + g * g - c) + extra * (e @ e - t @ e)
        Q1 = second * ((1 - c) ** 2 + g * g) + extra * (h @ h)
        return float((P0 + tau * P1) / (Q0 + tau * Q1))

    def solved(self, alpha: float) -> Design:
        """With c such that alpha at tau = 1/8 is as wanted, or the nearest that c allows."""
        grid = np.linspace(-0.5, 4, 400)
        gaps = np.array([replace(self, common=c).alpha(1 / 8) - alpha for c in grid])
        change = np.flatnonzero(np.sign(gaps[:-1]) != np.sign(gaps[1:]))
        if not len(change):
            return replace(self, common=float(grid[np.abs(gaps).argmin()]))
        k = change[0]
        return replace(
            self,
            common=float(optimize.brentq(lambda c: replace(self, common=c).alpha(1 / 8) - alpha, grid[k], grid[k + 1])),
        )

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...], *, rotated: bool = True) -> Sample:
        """Vectors ``[*shape, d]``; with more dimensions than three a vector needs, a rotation of them.

        Not ``rotated`` where draws are added to each other: each would have a rotation of its own.
        """
        d, n = len(self.variances), shape[-1]
        if (
            rotated and d > 3 * n + 3
        ):  # the rows of a triangle have the inner products that d isotropic coordinates would have
            rows = 3 * n
            noise = np.zeros((*shape[:-1], rows, rows + 3))
            noise[..., :3] = rng.normal(size=(*shape[:-1], rows, 3))
            below = np.tri(rows, k=-1, dtype=bool)
            normal = rng.standard_normal((math.prod(shape[:-1]), int(below.sum())), dtype=np.float32)
            noise[..., 3:][..., below] = normal.reshape(*shape[:-1], -1)
            each = np.arange(rows)
            noise[..., each, each + 3] = np.sqrt(rng.chisquare(d - 3 - each, size=(*shape[:-1], rows)))
            noise = np.moveaxis(noise.reshape(*shape, 3, rows + 3), -2, 0) / math.sqrt(d)
        else:
            single = rng.standard_normal((3, *shape, d), dtype=np.float32)
            noise = np.asarray(single * np.sqrt(self.variances), dtype=np.float64)
        if self.scale == "log-normal":
            s = np.exp(self.spread * rng.normal(size=(*shape, 1)))
        elif self.scale == "student":
            s = 1 / np.sqrt(rng.chisquare(self.spread, size=(*shape, 1)) / self.spread)
        else:
            s = np.ones((*shape, 1))
        z, other, third = noise
        k = self.shared
        parts = (z, self.common * z + self.own * other, k * z + 0.5 * math.sqrt(1 - k**2) * third)
        found = {}
        for name, mean, part in zip("tem", self.means, parts, strict=True):
            long = _padded(mean, noise.shape[-1])
            found[name] = s * (long + part) if self.whole else long + s * part
        return found


def _padded(mean: Array, d: int) -> Array:
    """The mean in d coordinates."""
    return np.pad(mean[:d], (0, max(d - len(mean), 0)))


def with_pairs(design: Design, rng: np.random.Generator, shape: tuple[int, int]) -> Sample:
    """Eight pairs a prompt, ``[R, N, 8, d]``: half of the noise, and the scale, is the prompt's."""
    one, *drawn = (design.draw(rng, shape, rotated=False) for _ in range(9))
    means = dict(zip("tem", design.means, strict=True))
    half = math.sqrt(0.5)
    found = {}
    for name, mean in means.items():
        long = _padded(mean, one[name].shape[-1])
        found[name] = np.stack([long + half * (one[name] - long) + half * (x[name] - long) for x in drawn], axis=-2)
    return found


def finite(name: str, vectors: Mapping[str, Float[np.ndarray, "prompts parameters"]]) -> WeightPopulation:
    """Uniform draws, with repetitions, from given gradients; without ``m``, mu is E t."""
    whole = {key: np.asarray(value, dtype=np.float64) for key, value in vectors.items()}
    h, e, mu = whole["t"] - whole["e"], whole["e"], whole.get("m", whole["t"]).mean(axis=0)
    Q0, P0 = h.mean(axis=0) @ h.mean(axis=0), -h.mean(axis=0) @ (e.mean(axis=0) - mu)
    Q1, P1 = (h**2).sum(axis=1).mean() - Q0, h.mean(axis=0) @ e.mean(axis=0) - (h * e).sum(axis=1).mean()

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Sample:
        rows = rng.integers(len(h), size=shape)
        return {key: value[rows] for key, value in whole.items()}

    return WeightPopulation(name, draw, tuple(float((P0 + tau * P1) / (Q0 + tau * Q1)) for tau in TAUS))


def populations(seed: int) -> list[WeightPopulation]:
    """The table's populations; sizes of biases and noises, and dimensions that the issue leaves open, are drawn."""
    rng = np.random.default_rng([seed, 1])
    found: list[WeightPopulation] = []

    def add(name: str, alpha: float, scale: str = "none", spread: float = 0.0, **how: float) -> None:
        dimension = int(how.get("dimension", 0) or rng.integers(30, 120))
        variances = np.ones(dimension)
        if how.get("power"):
            variances = 1 / np.arange(1, dimension + 1)
        bias, mean = math.sqrt(rng.uniform(0.005, 0.04)), math.sqrt(rng.uniform(0.02, 0.1))
        means = np.zeros((3, 3))
        means[:, 0] = mean
        means[1, 1] = bias  # E e - mu
        means[0, 1:] = bias * np.array([0.4 if alpha > 1 else 0.0, float(rng.uniform(0, 0.3))])  # E t - mu
        if dimension == 2:
            means[0, 1] += means[0, 2]
            means[:, 2] = 0
        design = Design(
            means,
            variances / variances.sum(),
            float(rng.uniform(0.15, 0.4)),
            0.8 if how.get("shared") else 0.0,
            scale,
            spread,
            bool(how.get("whole")),
        ).solved(alpha)
        pairs = bool(how.get("pairs"))
        draw = partial(with_pairs, design) if pairs else design.draw
        honest = scale == "none" and not pairs
        truth = tuple(design.alpha(tau) for tau in TAUS)
        found.append(WeightPopulation(f"{name}, d = {dimension}, alpha {alpha:g}", draw, truth, honest, pairs))

    for alpha in (0.0, 0.05, 0.5, 0.95, 1.0, 1.5):
        add("Gaussian", alpha)
    for dimension in (2, 10, 5000):
        add("Gaussian", 0.5, dimension=dimension)
    add("1/k spectrum", 0.5, dimension=200, power=True)
    add("shared traces", 0.5, shared=True)
    add("1 to 8 pairs", 0.5, pairs=True)
    for spread in (0.7, 1.0, 1.5):
        for alpha in (0.05, 1.0) if spread != 0.7 else (0.0, 0.05, 0.5, 0.95, 1.0, 1.5):
            add(f"log-normal scale of noise, sd {spread}", alpha, "log-normal", spread)
        add(f"log-normal scale of all, sd {spread}", 0.5, "log-normal", spread, whole=True)
    for alpha in (0.05, 1.0):
        add("log-normal scale of noise, sd 1", alpha, "log-normal", 1.0, dimension=2000)
    for alpha in (0.0, 0.5, 1.5):
        add("Student t_3 scale of noise", alpha, "student", 3.0)
    add("Student t_3 scale of all", 0.05, "student", 3.0, whole=True)
    atoms = rng.normal(size=(3, 60, 30)) / math.sqrt(30) + 0.1 * rng.normal(size=(3, 1, 30))
    found.append(finite("60 vectors, drawn with repetition", dict(zip("tem", atoms, strict=True))))
    return found


def samples(
    population: WeightPopulation, n_prompts: int, replicates: int, seed: int, *, injected: bool = False
) -> Iterator[list[LinearRatio]]:
    """Ratios of alpha at `TAUS` of fresh samples, by the jackknife that the command uses; some samples at a time."""
    rng = np.random.default_rng([seed, 2, n_prompts, *population.name.encode()])
    width = population.draw(np.random.default_rng(0), (1, n_prompts))["t"].shape[-1]
    pairs = min(n_prompts, MOST_SINGLE_PROMPTS)
    some = max(1, _NUMBERS_AT_ONCE // (n_prompts * max(width, pairs)))
    for start in range(0, replicates, some):
        vectors = population.draw(rng, (min(some, replicates - start), n_prompts))
        if not population.pairs:
            yield quick_ratios(vectors, TAUS, injected=injected)
            continue
        for r in range(len(vectors["t"])):
            kept = np.arange(8) < rng.integers(1, 9, size=(n_prompts, 1))
            prompts = np.repeat(np.arange(n_prompts), kept.sum(axis=1)).tolist()
            summary = summary_of_arrays({name: x[r][kept] for name, x in vectors.items()}, clusters=prompts)
            yield [LinearRatio.alpha(summary, tau) for tau in TAUS]


@dataclass(frozen=True)
class WeightCoverage:
    """One line of the table.

    Attributes:
        population: Its name.
        prompts: N.
        tau: eta L / B.
        alpha: The truth.
        replicates: Samples.
        given: Share of samples for which an interval is given.
        coverage: Of those, the share that hold the truth; NaN where there is none.
        misled: Share of all samples with an interval that misses.
        before: Coverage of the interval before this one, where it was bounded.
        n_eff: Median effective prompts.
        largest: Median share of the largest prompt.
        width: Median width over that of the interval before, where that one is honest; else NaN.
    """

    population: str
    prompts: int
    tau: float
    alpha: float
    replicates: int
    given: float
    coverage: float
    misled: float
    before: float
    n_eff: float
    largest: float
    width: float

    @property
    def error(self) -> float:
        """Binomial standard error of the coverage, were it the floor."""
        return math.sqrt(FLOOR * (1 - FLOOR) / max(self.given * self.replicates, 1))

    @property
    def passed(self) -> bool:
        """Coverage reaches the floor; where hardly ever an interval is given, misleading ones are at most 1 - floor."""
        return self.misled <= 1 - FLOOR if self.given < COUNTED else self.coverage >= FLOOR


def coverage(
    population: WeightPopulation, n_prompts: int, replicates: int, seed: int, *, injected: bool = False
) -> list[WeightCoverage]:
    """Coverage at each of `TAUS`; ``injected`` puts V-statistics in the place of U-statistics."""
    columns: list[list[tuple[Array, ...]]] = [[] for _ in TAUS]
    widths: list[list[float]] = [[] for _ in TAUS]
    for found in samples(population, n_prompts, replicates, seed, injected=injected):
        for k, ratio in enumerate(found):
            tails = Tails.of(ratio)
            test = RatioTest.of(ratio, t_quantile(0.95, ratio.group_sizes.shape[-1]), tails.moves)
            shape = np.shape(tails.n_eff)
            truth, far = np.full(shape, population.truth[k]), np.full((2, *shape), 1e6)
            far[0] *= -1
            T, bound, *_ = test.studentised(truth)
            T_far, bound_far, *_ = test.studentised(far)
            outside = np.abs(T_far) > bound_far
            bounded = ~test.holds(far).any(axis=0) & (test.estimate[..., 1] > 0) & tails.enough()
            old = outside.all(axis=0) & (test.estimate[..., 1] > 0)
            row = (test.holds(truth), bounded, np.abs(T) <= bound, old, tails.n_eff, tails.largest)
            columns[k].append(tuple(np.atleast_1d(x) for x in row))
            if population.honest and len(widths[k]) < 100:
                sets = ratio_sets(ratio)
                widths[k] += _relative_widths(sets.low, sets.high, sets.shape == BOUNDED, test)
    lines = []
    for k, tau in enumerate(TAUS):
        inside, given, before, old, n_eff, largest = (np.concatenate(x) for x in zip(*columns[k], strict=True))
        lines.append(
            WeightCoverage(
                population.name,
                n_prompts,
                tau,
                population.truth[k],
                len(inside),
                float(given.mean()),
                float(inside[given].mean()) if given.any() else math.nan,
                float((given & ~inside).mean()),
                float(before[old].mean()) if old.any() else math.nan,
                float(np.median(n_eff)),
                float(np.median(largest)),
                float(np.median(widths[k])) if widths[k] else math.nan,
            )
        )
    return lines


def _relative_widths(low: Array, high: Array, given: Mask, before: RatioTest) -> list[float]:
    """Width over that of the set ``|T| <= bound``, whose ends bisection finds within the other's."""
    middle = before.estimate[..., 0] / before.estimate[..., 1]
    ends = []
    for end in (low, high):
        inner, outer = middle, np.where(given, end, middle)
        for _ in range(30):
            half = (inner + outer) / 2
            T, bound, *_ = before.studentised(half)
            inner, outer = np.where(np.abs(T) <= bound, half, inner), np.where(np.abs(T) <= bound, outer, half)
        ends.append(inner)
    width = np.where(given, (high - low) / np.where(given, ends[1] - ends[0], 1), np.nan)
    return [float(x) for x in np.atleast_1d(width) if np.isfinite(x)]
