import random

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import TokenSequence, collate, length_batches, padding_share


def total_padding(lengths: list[int], batches: list[list[int]]) -> float:
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / padded


@pytest.mark.parametrize("max_tokens", [4096, 16384, 10**9])
def test_padding_stays_below_five_percent_on_lengths_spread_tenfold(max_tokens: int) -> None:
    rng = random.Random(0)
    lengths = [int(400 * 10 ** rng.random()) for _ in range(300)]
    batches = length_batches(lengths, max_tokens=max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    assert total_padding(lengths, batches) <= 0.05
    assert all(padding_share([lengths[i] for i in batch]) <= 0.05 for batch in batches)
    assert all(len(batch) * max(lengths[i] for i in batch) <= max_tokens for batch in batches)
    # The naive order would waste most of the tokens: the bound is no accident of the data.
    naive = [list(range(start, start + 10)) for start in range(0, 300, 10)]
    assert total_padding(lengths, naive) > 0.3


def test_batches_are_full_where_the_budget_allows() -> None:
    assert [len(b) for b in length_batches([100] * 10, max_tokens=400)] == [4, 4, 2]
    assert [len(b) for b in length_batches([100] * 10, max_tokens=10**6, max_sequences=5)] == [5, 5]


def test_a_sequence_over_the_budget_gets_its_own_batch() -> None:
    assert length_batches([50, 500, 60], max_tokens=120, max_padding=0.5) == [[1], [2, 0]]


def test_groups_stay_together_and_do_not_worsen_the_padding_of_their_own() -> None:
    rng = random.Random(1)
    lengths = [int(100 * 10 ** rng.random()) for _ in range(200)]
    groups = [i // 2 for i in range(200)]
    batches = length_batches(lengths, max_tokens=20_000, groups=groups)
    home = {i: n for n, batch in enumerate(batches) for i in batch}
    assert all(home[i] == home[i + 1] for i in range(0, 200, 2))
    alone = [padding_share(lengths[i : i + 2]) for i in range(0, 200, 2)]
    for batch in batches:
        assert padding_share([lengths[i] for i in batch]) <= max(0.05, *(alone[i // 2] for i in batch))


def test_order_of_equal_lengths_is_the_input_order() -> None:
    assert length_batches([7, 7, 7], max_tokens=100) == [[0, 1, 2]]


def test_collate_marks_exactly_the_completion_targets() -> None:
    batch = collate([TokenSequence((1, 2), (3, 4, 5)), TokenSequence((6,), (7,))], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    targets = [row[mask].tolist() for row, mask in zip(batch.input_ids[:, 1:], batch.completion_mask, strict=True)]
    assert targets == [[3, 4, 5], [7]]


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (TokenSequence((1,), ()), "record 1: the completion is empty"),
        (TokenSequence((), (1,)), "record 1: the prompt is empty"),
        (TokenSequence((1,) * 5, (1,) * 4), "record 1: 9 tokens, but the model has positions for 8"),
    ],
)
def test_bad_sequences_are_refused_by_name(sequence: TokenSequence, message: str) -> None:
    with pytest.raises(UserError, match=message):
        collate([TokenSequence((1,), (2,)), sequence], max_positions=8)


def test_errors_use_the_given_names_and_no_sequences_is_an_error() -> None:
    with pytest.raises(UserError, match=r"pair p7 \(chosen\): the completion is empty"):
        collate([TokenSequence((1,), ())], names=["pair p7 (chosen)"])
    with pytest.raises(UserError, match="no sequences"):
        collate([])
