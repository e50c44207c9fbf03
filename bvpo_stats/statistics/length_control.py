"""Win rates freed of the length of the answers, by the logistic regression of AlpacaEval 2."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from bvpo_stats.statistics.clusters import Interval, deleted_interval

Values = Float[np.ndarray, " prompts"]
_CELLS = 4_000_000  # of the table deletions x prompts at a time
_STEPS = 60
_LARGEST = 30.0  # log odds beyond which the maximum is at infinity


def length_controlled_rate(wins: Values, lengths: Values, *, level: float = 0.95) -> Interval:
    r"""The win rate that the model would have with answers as long as the baseline's.

    A generalised linear model of the outcome w_i in [0, 1] (1 a win, 1/2 a tie) against the length difference d_i of
    the two answers,

        P(win_i) = logistic(theta + phi tanh(d_i / s)),     s the standard deviation of the d_i,

    is fitted by maximum likelihood (the cross-entropy of w_i, so that ties count half). theta is the model's own
    advantage, phi what length buys. The length-controlled win rate is the prediction at d_i = 0, logistic(theta). This
    is the published form of AlpacaEval 2 without its third term, the difficulty of each instruction: that one was
    fitted over many models on AlpacaEval's own prompts and judge, and cannot be had from one comparison.

    The interval is by delete-one-prompt jackknife on theta (each time with s of the remaining prompts), mapped through
    the logistic function.

    Args:
        wins: Outcome of each prompt.
        lengths: Length of the model's answer minus that of the baseline's, in characters as in AlpacaEval.
        level: Confidence level.

    Returns:
        The rate and its interval. Where all answers are as long as the baseline's it is the plain win rate. Undefined
        (None) where the likelihood has no maximum: all outcomes are the same, length tells wins from losses perfectly,
        or all differences are one and the same number other than 0.

    Source:
        Dubois, Galambosi, Liang and Hashimoto (2024), Length-controlled AlpacaEval, Section 3.
    """
    every, without = _log_odds(wins, lengths)
    if not np.isfinite(every):
        return Interval(None, None, None)
    found = deleted_interval(every, without, level=level)
    low, high = (None if end is None else float(expit(end)) for end in (found.low, found.high))
    return Interval(float(expit(every)), low, high)


def length_controlled_difference(
    new: tuple[Values, Values], old: tuple[Values, Values], *, level: float = 0.95
) -> Interval:
    """Difference of two models' length-controlled win rates on the same prompts; prompts are deleted from both at once.

    Args:
        new: Wins and length differences of the one model.
        old: Of the other, prompt by prompt.
        level: Confidence level.
    """
    (new_all, new_without), (old_all, old_without) = _log_odds(*new), _log_odds(*old)
    value = float(expit(new_all) - expit(old_all))
    if not np.isfinite(value):
        return Interval(None, None, None)
    return deleted_interval(value, expit(new_without) - expit(old_without), level=level)


def _log_odds(wins: Values, lengths: Values) -> tuple[float, Values]:
    """Theta from all prompts, and without each in turn; NaN where it does not exist."""
    y, d = np.asarray(wins, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    n = len(y)
    every = float(fit_log_odds(y, d, np.ones((1, n)))[0, 0]) if n else float("nan")
    rows = max(1, _CELLS // max(1, n))
    parts = []
    for start in range(0, n, rows):
        size = min(rows, n - start)
        weights = np.ones((size, n))
        weights[np.arange(size), start + np.arange(size)] = 0.0
        parts.append(fit_log_odds(y, d, weights)[:, 0])
    return every, np.concatenate(parts) if parts else np.zeros(0)


def fit_log_odds(
    wins: Values, lengths: Values, weights: Float[np.ndarray, "fits prompts"]
) -> Float[np.ndarray, "fits 2"]:
    """Newton's method for many weighted fits at once.

    Args:
        wins: Outcomes in [0, 1].
        lengths: Length differences.
        weights: 0 or 1 for each fit and prompt.

    Returns:
        (theta, phi) of each fit; NaN where there is no maximum.
    """
    x = np.tanh(_standardised(lengths, weights))
    alike = (np.abs(x) * weights).sum(axis=1) == 0.0  # no length difference at all: only theta is left to fit
    fit = np.zeros((len(weights), 2))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for _ in range(_STEPS):
            p = expit(fit[:, :1] + fit[:, 1:] * x)
            error, curve = weights * (wins - p), weights * p * (1 - p)
            slope = np.stack([error.sum(axis=1), (error * x).sum(axis=1)], axis=1)
            a, b, c = curve.sum(axis=1), (curve * x).sum(axis=1), (curve * x * x).sum(axis=1) + alike
            step = np.stack([c * slope[:, 0] - b * slope[:, 1], a * slope[:, 1] - b * slope[:, 0]], axis=1)
            step /= (a * c - b * b)[:, None]
            step = np.clip(step, -2.0, 2.0)  # far from the maximum Newton may overshoot
            fit += step
            if np.all(~np.isfinite(step) | (np.abs(step) < 1e-12)):
                break
        lost = ~np.isfinite(fit).all(axis=1) | (np.abs(fit) > _LARGEST).any(axis=1) | (np.abs(step) > 1e-8).any(axis=1)
    fit[lost] = np.nan
    return fit


def _standardised(lengths: Values, weights: Float[np.ndarray, "fits prompts"]) -> Float[np.ndarray, "fits prompts"]:
    """Length differences over their standard deviation (n - 1) among the prompts of each fit; not centred."""
    count = weights.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (weights * lengths).sum(axis=1, keepdims=True) / count
        spread = np.sqrt((weights * (lengths - mean) ** 2).sum(axis=1, keepdims=True) / (count - 1))
        return np.where(lengths == 0.0, 0.0, lengths / spread)
