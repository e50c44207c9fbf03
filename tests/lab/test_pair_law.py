from itertools import product

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.lab.oracle.build import best_worst_law, distinct_pair_law


@pytest.mark.parametrize("n_samples", [2, 3, 5])
def test_equals_enumeration_of_all_samples(n_samples):
    probabilities, rewards = np.array([0.1, 0.55, 0.05, 0.3]), np.array([0.2, -1.0, 3.0, 0.7])
    brute = np.zeros((4, 4))
    for answers in product(range(4), repeat=n_samples):
        best, worst = max(answers, key=lambda a: rewards[a]), min(answers, key=lambda a: rewards[a])
        brute[best, worst] += np.prod(probabilities[list(answers)])
    law = best_worst_law(probabilities, rewards, n_samples)
    np.testing.assert_allclose(law, brute, rtol=0, atol=1e-15)
    assert abs(law.sum() - 1) < 1e-14
    np.fill_diagonal(brute, 0)
    np.testing.assert_allclose(distinct_pair_law(probabilities, rewards, n_samples), brute / brute.sum(), atol=1e-15)


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="two samples"):
        best_worst_law(np.array([0.5, 0.5]), np.array([0.0, 1.0]), 1)
    with pytest.raises(UserError, match="same reward"):
        best_worst_law(np.array([0.5, 0.5]), np.array([1.0, 1.0]), 2)
