"""What self-normalised importance sampling returns on average, exactly, by listing every multiset of K traces."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from jaxtyping import Float
from scipy.special import gammaln


def multisets(
    law: Float[np.ndarray, " outcomes"], size: int
) -> tuple[Float[np.ndarray, "ways outcomes"], Float[np.ndarray, " ways"]]:
    """Every way to draw ``size`` times from a law: counts of each outcome, and multinomial probabilities.

    Args:
        law: Probabilities of the outcomes, all positive.
        size: Number of draws; there are C(size + outcomes - 1, outcomes - 1) ways.

    >>> counts, probability = multisets(np.array([0.25, 0.75]), 2)
    >>> counts.tolist(), probability.round(4).tolist()
    ([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]], [0.5625, 0.375, 0.0625])
    """
    n = len(law)
    bars = np.array(list(combinations(range(size + n - 1), n - 1))).reshape(-1, n - 1)
    edges = np.concatenate([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), size + n - 1)], axis=1)
    counts = np.diff(edges, axis=1) - 1.0
    log_probability = gammaln(size + 1) - gammaln(counts + 1).sum(axis=1) + counts @ np.log(law)
    return counts, np.exp(log_probability)


def expected_snis(
    proposal: Float[np.ndarray, " traces"],
    weights: Float[np.ndarray, " traces"],
    scores: Float[np.ndarray, "traces parameters"],
    n_traces: int,
    anchor: Float[np.ndarray, " traces"] | None = None,
) -> Float[np.ndarray, " parameters"]:
    """E[sum_k w_k s_k / sum_k w_k] over K traces.

    Args:
        proposal: q(r).
        weights: w(r), up to a factor.
        scores: s(r, y).
        n_traces: K.
        anchor: Law of the first trace where it is an anchor, the other K - 1 being of q; None for K draws of q.
    """
    if anchor is None:
        counts, probability = multisets(proposal, n_traces)
        return probability @ (counts * weights @ scores / (counts @ weights)[:, None])
    counts, probability = multisets(proposal, n_traces - 1)
    total = np.zeros(scores.shape[-1])
    for first, chance in enumerate(anchor):
        with_anchor = counts + np.eye(len(proposal))[first]
        mean = (with_anchor * weights) @ scores / (with_anchor @ weights)[:, None]
        total = total + chance * (probability @ mean)
    return total
