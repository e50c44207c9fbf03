"""Every entry of Tables 3, 4 and 5, computed by hand on a small file of samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.sampling.engines.file_engine import adopt_completions
from bvpo_stats.studies.variance.report import Definitions, VarianceTables, reduce_sample, variance_tables

# (prompt, mode, log-probs of the trace with its closing tag, log-probs of the answer with end-of-sequence)
SAMPLES = [
    ("a", "thinking", [-1.0, -2.0], [-0.5]),
    ("a", "thinking", [-0.5], [-0.25, -0.25]),
    ("a", "thinking", [-1.5, -0.5, -1.0], [-1.0]),
    ("a", "nothinking", [], [-0.5, -0.5]),
    ("a", "nothinking", [], [-1.5]),
    ("b", "thinking", [-2.0, -1.0], [-0.5, -0.5]),
    ("b", "thinking", [-0.25, -0.25], [-0.5]),
    ("b", "nothinking", [], [-0.25, -0.25, -0.5]),
    ("b", "nothinking", [], [-0.5]),
    ("b", "nothinking", [], [-0.25, -0.5]),
]


def write_samples(path: Path, *, truncated: int = 0) -> Path:
    rows = []
    for prompt, mode, trace, answer in SAMPLES:
        count = len(trace) + len(answer)
        rows.append(
            {
                "prompt_id": prompt,
                "mode": mode,
                "prompt_ids": [1, 2],
                "completion_ids": list(range(10, 10 + count)),
                "answer_start": len(trace),
                "logprobs": trace + answer,
                "finish_reason": "stop",
            }
        )
    rows += [dict(rows[0], finish_reason="length", answer_start=None, trace="cut")] * truncated
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tables(path: Path, definitions: Definitions | None = None) -> VarianceTables:
    completions = list(adopt_completions(path, None))
    return variance_tables((reduce_sample(c, np.array(c.logprobs)) for c in completions), definitions)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "samples.jsonl")


def test_table_3_by_hand(samples: Path) -> None:
    found = tables(samples).table3
    # joint log-probs: a think -3.5, -1, -4; a no -1, -1.5; b think -4, -1; b no -1, -0.5, -0.75
    var_think = (2.583333333333333 + 4.5) / 2
    var_no = (0.125 + 0.0625) / 2
    assert found["logp_variance_ratio"].value == pytest.approx(var_think / var_no)
    # lengths: a think 3, 3, 4; a no 2, 1; b think 4, 3; b no 3, 1, 2
    assert found["length_variance_ratio"].value == pytest.approx((1 / 3 + 0.5) / (0.5 + 1.0))


def test_table_3_with_population_variance(samples: Path) -> None:
    found = tables(samples, Definitions(ddof=0)).table3
    var_think = (2.583333333333333 * 2 / 3 + 4.5 / 2) / 2
    var_no = (0.125 / 2 + 0.0625 * 2 / 3) / 2
    assert found["logp_variance_ratio"].value == pytest.approx(var_think / var_no)


def test_table_4_by_hand(samples: Path) -> None:
    found = tables(samples).table4
    assert found["mean_length_ratio"].value == pytest.approx((10 / 3 + 3.5) / (1.5 + 2))
    think, no = 13.5 / 17, 4.75 / 9  # total negative log-likelihood over total tokens
    assert found["nll_think"].value == pytest.approx(think)
    assert found["nll_no"].value == pytest.approx(no)
    assert found["delta_nll"].value == pytest.approx(think - no)
    assert found["percent_increase"].value == pytest.approx(100 * (think / no - 1))


def test_table_5_by_hand(samples: Path) -> None:
    found = tables(samples).table5
    # trace: a 3 + 0.5 + 3 over 2 + 1 + 3 tokens, b 3 + 0.5 over 2 + 2; answer: a 0.5 + 0.5 + 1 over 4, b 1 + 0.5 over 3
    assert found["trace_token_share"].value == pytest.approx(10 / 17)
    assert found["nll_trace"].value == pytest.approx(10.0 / 10)
    assert found["nll_answer"].value == pytest.approx(3.5 / 7)
    assert found["nll_ratio"].value == pytest.approx(2.0)


def test_pooled_averages_satisfy_the_papers_identity(samples: Path) -> None:
    """NLL_think = share * NLL_trace + (1 - share) * NLL_answer holds exactly when pooled over tokens, and only then."""
    pooled = tables(samples)
    share = pooled.table5["trace_token_share"].value
    assert share is not None
    mixed = share * pooled.table5["nll_trace"].value + (1 - share) * pooled.table5["nll_answer"].value  # type: ignore[operator]
    assert mixed == pytest.approx(pooled.table4["nll_think"].value, abs=1e-12)


def test_per_question_averages_by_hand(samples: Path) -> None:
    found = tables(samples, Definitions(nll="questions"))
    assert found.table4["nll_think"].value == pytest.approx((8.5 / 10 + 5 / 7) / 2)
    assert found.table4["nll_no"].value == pytest.approx((2.5 / 3 + 2.25 / 6) / 2)
    assert found.table5["trace_token_share"].value == pytest.approx((6 / 10 + 4 / 7) / 2)
    assert found.table5["nll_trace"].value == pytest.approx((6.5 / 6 + 3.5 / 4) / 2)
    assert found.table5["nll_answer"].value == pytest.approx((2.0 / 4 + 1.5 / 3) / 2)


def test_intervals_are_paired_over_questions(samples: Path) -> None:
    """With two questions the jackknife values are those of each question alone; the t quantile has one degree."""
    found = tables(samples).table3["logp_variance_ratio"]
    alone = np.log([4.5 / 0.0625, 2.583333333333333 / 0.125])
    half = 12.706204736174694 * np.sqrt(((alone - alone.mean()) ** 2).sum() / 2)
    assert found.value is not None
    assert found.low == pytest.approx(found.value * np.exp(-half), rel=1e-9)
    assert found.high == pytest.approx(found.value * np.exp(half), rel=1e-9)


def test_truncated_responses_are_counted_and_set_aside(tmp_path: Path, samples: Path) -> None:
    with_cut = tables(write_samples(tmp_path / "cut.jsonl", truncated=3))
    without = tables(samples)
    assert with_cut.truncated == 3
    assert with_cut.n_samples == without.n_samples == len(SAMPLES)
    assert with_cut.table3 == without.table3


def test_questions_with_one_response_are_dropped(tmp_path: Path, samples: Path) -> None:
    lines = samples.read_text().splitlines()
    lines.append(json.dumps(dict(json.loads(lines[0]), prompt_id="c")))
    path = tmp_path / "more.jsonl"
    path.write_text("\n".join(lines) + "\n")
    found = tables(path)
    assert (found.n_prompts, found.dropped_prompts) == (2, 1)
    assert found.table3 == tables(samples).table3


def test_all_truncated_is_an_error(tmp_path: Path, samples: Path) -> None:
    rows = [dict(json.loads(line), finish_reason="length") for line in samples.read_text().splitlines()]
    path = tmp_path / "cut.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="`max_new_tokens`"):
        tables(path)


@pytest.mark.parametrize(
    ("values", "message"), [([-1.0], "log-probs for 3 tokens"), ([-1.0, float("nan"), -1.0], "NaN")]
)
def test_bad_logprobs_are_named(samples: Path, values: list[float], message: str) -> None:
    completion = next(adopt_completions(samples, None))
    with pytest.raises(UserError, match=message) as error:
        reduce_sample(completion, np.array(values))
    assert "a/thinking/0" in str(error.value)
