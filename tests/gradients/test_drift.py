"""Log-ratios and projected scores of D_t pairs, against the oracle's tables."""

import numpy as np
import pytest

from bvpo_stats.gradients.engine import BlockLayout
from bvpo_stats.gradients.examples import join
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.stream import project_sides


@pytest.mark.parametrize("stored", ["record", "adapter"])
def test_sides_are_the_tables(drifted, stored):
    table, x = drifted.oracle.table, drifted.draws.prompt
    layout = BlockLayout.of(drifted.subset)
    rng = np.random.default_rng(0)
    vector = {name: rng.normal(size=weight.numel()) for name, weight in drifted.subset.parameters.items()}
    direction = {block: np.zeros((1, size)) for block, size in layout.sizes.items()}
    for name, (block, offset, size) in layout.places.items():
        direction[block][0, offset : offset + size] = vector[name]
    options = StreamOptions(reference=stored, max_tokens=200)
    found = project_sides(drifted.oracle.policy, drifted.subset, join(drifted.pairs).examples, direction, options)
    along = table.scores @ np.concatenate(list(vector.values()))
    for column, (trace, answer) in enumerate(
        (drifted.draws.thinking.chosen_pair, drifted.draws.thinking.rejected_pair)
    ):
        np.testing.assert_allclose(found.log_ratios[:, column], table.log_ratio[x, trace, answer], atol=1e-10)
        np.testing.assert_allclose(found.projections[:, column, 0], along[x, trace, answer], rtol=1e-9, atol=1e-9)
