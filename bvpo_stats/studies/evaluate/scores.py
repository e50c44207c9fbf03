"""From one number per problem to the report's scores, averages and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bvpo_stats.statistics.proportions import (
    Interval,
    average_interval,
    difference_interval,
    mean_interval,
    proportion_interval,
)
from bvpo_stats.studies.evaluate.report import BASE, Column, Scores

Series = Float[np.ndarray, " problems"]
AVERAGE = "average"


@dataclass(frozen=True)
class ColumnValues:
    """One figure of merit before it is averaged over problems.

    Attributes:
        column: What it is.
        values: By model and mode: one number per problem, NaN where there is none.
        trials: Responses behind each number.
    """

    column: Column
    values: Mapping[str, Mapping[str, Series]]
    trials: float = 1.0


def scores_of(columns: Sequence[ColumnValues], level: float) -> Scores:
    """Every figure of merit with its interval, by model and mode, clustered by problem."""

    def score(column: ColumnValues, label: str, mode: str) -> Interval:
        values = _present(column.values[label][mode])
        if column.column.percent:
            return proportion_interval(values, trials=column.trials, level=level)
        return mean_interval(values, level=level)

    return _each(columns, score, _labels(columns))


def differences_of(columns: Sequence[ColumnValues], level: float) -> Scores:
    """Each model minus ``base``, over the problems that both have, paired by problem."""

    def difference(column: ColumnValues, label: str, mode: str) -> Interval:
        new, old = _paired(column, label, mode)
        return difference_interval(new, old, level=level)

    return _each(columns, difference, [label for label in _labels(columns) if label != BASE])


def add_average(columns: Sequence[ColumnValues], scores: Scores, differences: Scores, level: float) -> Column | None:
    """Puts the plain average over benchmarks (Table 2's Avg.) beside them; None where there is one benchmark only."""
    shares = [column for column in columns if column.column.percent]
    if len(shares) < 2:
        return None
    for label, modes in scores.items():
        for mode, entries in modes.items():
            entries[AVERAGE] = average_interval([_present(c.values[label][mode]) for c in shares], level=level)
    for label, modes in differences.items():
        for mode, entries in modes.items():
            pairs = [_paired(column, label, mode) for column in shares]
            entries[AVERAGE] = average_interval([new - old for new, old in pairs], level=level)
    return Column(AVERAGE, "Avg.", "mean")


def _each(
    columns: Sequence[ColumnValues], entry: Callable[[ColumnValues, str, str], Interval], labels: Sequence[str]
) -> Scores:
    return {
        label: {
            mode: {column.column.name: entry(column, label, mode) for column in columns}
            for mode in columns[0].values[label]
        }
        for label in labels
    }


def _labels(columns: Sequence[ColumnValues]) -> list[str]:
    return list(columns[0].values) if columns else []


def _present(values: Series) -> Series:
    return values[np.isfinite(values)]


def _paired(column: ColumnValues, label: str, mode: str) -> tuple[Series, Series]:
    new, old = column.values[label][mode], column.values[BASE][mode]
    both = np.isfinite(new) & np.isfinite(old)
    return new[both], old[both]
