"""Coverage of intervals of mean variances, and of their ratio, where a few questions hold most of the sum.

A question has a variance of its own in each mode; it is estimated from a handful of responses, so that what a study
sees is that variance times noise. How variances differ between questions is the population.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from bvpo_stats.statistics.moments import Array
from bvpo_stats.statistics.tails import few_limit, log_ends

Sample = tuple[Array, Array]
Ends = tuple[Array, Array, Array, Array]
FLOORS = {30: 0.90, 100: 0.92, 200: 0.93, 1000: 0.93}
"""Least coverage by number of questions, for a nominal level of 95%."""
_AT_ONCE = 250_000  # cells of a table samples x questions


@dataclass(frozen=True)
class VariancePopulation:
    """Questions to draw from.

    Attributes:
        name: In words.
        draw: From a generator and a shape, estimated variances with and without a trace.
        means: Their expectations.
        responses: Behind each estimate.
        power_law: Whether variances have no variance themselves: then no interval holds, and n_eff must say so.
    """

    name: str
    draw: Callable[[np.random.Generator, tuple[int, int]], Sample]
    means: tuple[float, float]
    responses: int
    power_law: bool = False


def _noise(rng: np.random.Generator, shape: tuple[int, int], responses: int) -> Array:
    """A variance estimated from normal responses, over the true one."""
    return rng.chisquare(responses - 1, size=shape) / (responses - 1)


def _log_normal(
    sd: tuple[float, float], common: float, responses: int, rng: np.random.Generator, shape: tuple[int, int]
) -> Sample:
    """Scales exp(sd z) in each mode; ``common`` is the correlation of the two z."""
    shared, drawn = rng.normal(size=shape), []
    for spread in sd:
        z = np.sqrt(common) * shared + np.sqrt(1 - common) * rng.normal(size=shape)
        drawn.append(np.exp(2 * spread * z) * _noise(rng, shape, responses))
    return drawn[0], drawn[1]


def _student(freedom: float, responses: int, rng: np.random.Generator, shape: tuple[int, int]) -> Sample:
    """Responses are Student t over questions: a variance is f / chi^2_f."""
    return tuple(freedom / rng.chisquare(freedom, size=shape) * _noise(rng, shape, responses) for _ in range(2))  # type: ignore[return-value]


def _lengths(within: float, between: float, responses: int, rng: np.random.Generator, shape: tuple[int, int]) -> Sample:
    """Variances of log-normal lengths; ``within`` and ``between`` questions are standard deviations of the log."""
    drawn = []
    for _ in range(2):
        level = between * rng.normal(size=shape)
        lengths = np.exp(level[..., None] + within * rng.normal(size=(*shape, responses)))
        drawn.append(lengths.var(axis=-1, ddof=1))
    return drawn[0], drawn[1]


def _resampled(table: Array, rng: np.random.Generator, shape: tuple[int, int]) -> Sample:
    rows = rng.integers(len(table), size=shape)
    return table[rows, 0], table[rows, 1]


def measured(name: str, table: Float[np.ndarray, "questions modes"], responses: int) -> VariancePopulation:
    """A model's own per-question variances, as they were estimated."""
    means = table.mean(axis=0)
    return VariancePopulation(name, partial(_resampled, table), (float(means[0]), float(means[1])), responses)


def populations(seed: int) -> list[VariancePopulation]:
    """The table's populations; what the issue leaves open (correlations, lengths, numbers of responses) is drawn."""
    rng = np.random.default_rng([seed, 1])
    found = []

    def normal(sd: tuple[float, float], name: str) -> None:
        common, k = float(rng.uniform(0, 0.9)), int(rng.integers(3, 9))
        draw = partial(_log_normal, sd, common, k)
        words = f"{name}, correlation {common:.2f}, {k} responses"
        found.append(VariancePopulation(words, draw, (float(np.exp(2 * sd[0] ** 2)), float(np.exp(2 * sd[1] ** 2))), k))

    normal((0.0, 0.0), "one variance for all (Gaussian)")
    for sd in (0.7, 1.0, 1.5):
        normal((sd, sd), f"log-normal scale, sd {sd}")
    for sd in (1.0, 1.5):
        normal((sd, 0.2), f"log-normal scale, sd {sd} with a trace and 0.2 without")
    for least, most in ((0.3, 0.6), (0.6, 0.9)):
        within, between = float(rng.uniform(least, most)), float(rng.uniform(0.3, 0.6))
        mean = float(np.exp(2 * between**2 + within**2) * np.expm1(within**2))
        name = f"log-normal lengths, sd {within:.2f} within and {between:.2f} between questions, 5 responses"
        found.append(VariancePopulation(name, partial(_lengths, within, between, 5), (mean, mean), 5))
    for freedom in (float(rng.uniform(4.5, 7)), 3.0):
        mean = freedom / (freedom - 2)
        name = f"Student t_{freedom:.3g} scales, 5 responses"
        found.append(VariancePopulation(name, partial(_student, freedom, 5), (mean, mean), 5, freedom <= 4))
    return found


def jackknife_ends(above: Array, below: Array | None = None, *, level: float = 0.95) -> Ends:
    """The interval before this one, for comparison: log theta +- t_{N-1} times the jackknife standard error."""
    n = above.shape[1]
    logs = [np.log((x.sum(axis=1, keepdims=True) - x) / (n - 1)) for x in (above, below) if x is not None]
    values = [np.log(x.mean(axis=1)) for x in (above, below) if x is not None]
    without, value = (x[0] - x[1] if len(x) == 2 else x[0] for x in (logs, values))
    spread = np.sqrt((n - 1) * without.var(axis=1))
    half = stats.t.ppf(0.5 + level / 2, n - 1) * spread
    return value - half, value + half, np.full(len(half), np.nan), np.full(len(half), np.nan)


@dataclass(frozen=True)
class TailCoverage:
    """One line of the table.

    Attributes:
        population: Its name.
        questions: N.
        statistic: ``mean`` (with a trace) or ``ratio``.
        coverage: Share of samples whose interval holds the truth.
        below: Share whose interval lies below it.
        width: Median of the ends' ratio, high / low.
        n_eff: Median.
        few: Share of samples that are said to rest on few questions.
        power_law: As in the population.
    """

    population: str
    questions: int
    statistic: str
    coverage: float
    below: float
    width: float
    n_eff: float
    few: float
    power_law: bool

    @property
    def passed(self) -> bool:
        """Coverage reaches its floor; of a power law's mean, that most samples say that few questions rule."""
        if self.power_law and self.coverage < FLOORS[self.questions]:
            return self.few > 0.5
        return self.coverage >= FLOORS[self.questions]


def coverage(
    population: VariancePopulation,
    questions: int,
    replicates: int,
    seed: int,
    ends: Callable[..., Ends] = log_ends,
) -> list[TailCoverage]:
    """Coverage of the mean's and the ratio's interval over fresh samples."""
    rng = np.random.default_rng([seed, 2, questions, sum(map(ord, population.name))])
    size = max(1, _AT_ONCE // questions)
    truths = {"mean": np.log(population.means[0]), "ratio": np.log(population.means[0] / population.means[1])}
    found: dict[str, list[Ends]] = {name: [] for name in truths}
    for start in range(0, replicates, size):
        above, below = population.draw(rng, (min(size, replicates - start), questions))
        found["mean"].append(ends(above))
        found["ratio"].append(ends(above, below))
    lines = []
    for name, truth in truths.items():
        low, high, n_eff, _ = (np.concatenate(parts) for parts in zip(*found[name], strict=True))
        inside: NDArray[np.bool_] = (low <= truth) & (truth <= high)
        lines.append(
            TailCoverage(
                population.name,
                questions,
                name,
                float(inside.mean()),
                float((high < truth).mean()),
                float(np.exp(np.median(high - low))),
                float(np.median(n_eff)),
                float((n_eff < few_limit(questions)).mean()),
                population.power_law,
            )
        )
    return lines
