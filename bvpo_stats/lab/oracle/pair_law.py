"""The law of best-of-n and worst-of-n answers, by order statistics."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError


def best_worst_law(
    probabilities: Float[np.ndarray, " answers"], rewards: Float[np.ndarray, " answers"], n_samples: int
) -> Float[np.ndarray, "answers answers"]:
    r"""Joint law of the best and the worst of n independent answers.

    With the answers in ascending order of reward and C(b, a) the sum of the probabilities from b to a, all n answers
    lie in [b, a] with probability C(b, a)^n, so

        P(best = a, worst = b) = C(b, a)^n - C(b+1, a)^n - C(b, a-1)^n + C(b+1, a-1)^n,

    and on the diagonal (all n answers equal) it is p_a^n. The reward looks at the answer only, so given its answer the
    trace of the selected response keeps its law q(r | x, y): selection does not touch it.

    Args:
        probabilities: Law of one answer; sums to 1.
        rewards: Distinct rewards of the answers.
        n_samples: n, at least 2.

    Returns:
        P[a, b] = P(best is answer a, worst is answer b); the diagonal holds the ties, from which no pair can be made.

    Raises:
        UserError: Fewer than two samples, or rewards with ties.

    >>> law = best_worst_law(np.array([0.25, 0.75]), np.array([1.0, 0.0]), 2)
    >>> law.tolist()
    [[0.0625, 0.375], [0.0, 0.5625]]
    """
    if n_samples < 2:
        raise UserError("A pair needs at least two samples per prompt; raise n_samples.")
    if len(set(np.asarray(rewards).tolist())) != len(rewards):
        raise UserError("Two answers have the same reward, so best and worst are ambiguous; give distinct rewards.")
    order = np.argsort(rewards)
    cumulative = np.concatenate([[0.0], np.cumsum(np.asarray(probabilities, dtype=np.float64)[order])])

    def all_between(low: int, high: int) -> float:
        return float((cumulative[high + 1] - cumulative[low]) ** n_samples) if low <= high else 0.0

    law = np.zeros((len(order), len(order)))
    for high, best in enumerate(order):
        for low, worst in enumerate(order[: high + 1]):
            inside = all_between(low, high) - all_between(low + 1, high)
            law[best, worst] = max(0.0, inside - all_between(low, high - 1) + all_between(low + 1, high - 1))
    return law


def distinct_pair_law(
    probabilities: Float[np.ndarray, " answers"], rewards: Float[np.ndarray, " answers"], n_samples: int
) -> Float[np.ndarray, "answers answers"]:
    """:func:`best_worst_law` given that the two answers differ, as in D_t and D_e: tied prompts are drawn again.

    >>> distinct_pair_law(np.array([0.25, 0.75]), np.array([1.0, 0.0]), 2).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """
    law = best_worst_law(probabilities, rewards, n_samples)
    np.fill_diagonal(law, 0.0)
    return law / law.sum()
