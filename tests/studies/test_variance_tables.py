"""Every entry of Tables 3, 4 and 5, computed by hand on a small file of samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.records import Mode
from bvpo_stats.sampling.engines.file_engine import adopt_completions
from bvpo_stats.studies.variance.report import (
    Definitions,
    PositionProfile,
    ScoredSample,
    VarianceReport,
    VarianceTables,
    histogram,
    reduce_sample,
    variance_tables,
)

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
    with pytest.raises(
        UserError, match=r"No question has at least 2 complete responses .* a larger limit on new tokens"
    ):
        tables(path)


@pytest.mark.parametrize(
    ("values", "message"), [([-1.0], "log-probs for 3 tokens"), ([-1.0, float("nan"), -1.0], "NaN")]
)
def test_bad_logprobs_are_named(samples: Path, values: list[float], message: str) -> None:
    completion = next(adopt_completions(samples, None))
    with pytest.raises(UserError, match=message) as error:
        reduce_sample(completion, np.array(values))
    assert "a/thinking/0" in str(error.value)


def question(name: str, thinking: list[float], nothinking: list[float]) -> list[ScoredSample]:
    """Responses of one question with the given log p, all of them four tokens long without a trace."""
    modes: list[tuple[Mode, list[float]]] = [("thinking", thinking), ("nothinking", nothinking)]
    return [
        ScoredSample(name, mode, logp, 4 + at * (mode == "thinking"), logp / 2 if mode == "thinking" else 0.0, 2, True)
        for mode, values in modes
        for at, logp in enumerate(values)
    ]


def spread_questions(count: int, scale: float = 0.0) -> list[ScoredSample]:
    """Variances that differ by a log-normal scale with a trace, and not at all without."""
    rng = np.random.default_rng(4)
    scales = np.exp(scale * rng.normal(size=count))
    rows = [
        question(f"q{at:04}", list(-30 + scales[at] * rng.normal(size=5)), list(-9 + rng.normal(size=5)))
        for at in range(count)
    ]
    return [sample for row in rows for sample in row]


def written(samples: list[ScoredSample]) -> VarianceReport:
    """The report of these responses."""
    return VarianceReport(
        model="m",
        seed=0,
        **vars(variance_tables(samples)),
        definitions=Definitions(),
        sampling=None,
        template="t",
        published=None,
        lengths=histogram(samples, "length"),
        logps=histogram(samples, "logp"),
        positions={},
    )


def test_table_3_has_the_ratio_of_geometric_means(samples: Path) -> None:
    found = tables(samples).table3["logp_geometric_ratio"]
    # a: 2.583 over 3 responses against 0.125 over 2; b: 4.5 over 2 against 0.0625 over 3; the bias of a log of k
    # responses, psi((k - 1) / 2) - log((k - 1) / 2), cancels between the two questions
    assert found.value == pytest.approx(np.sqrt(2.583333333333333 / 0.125 * 4.5 / 0.0625))


def test_few_questions_that_rule_are_said_and_the_estimate_still_shown() -> None:
    report = written(spread_questions(60, 2.0))
    cell = report.table3["logp_variance_ratio"]
    assert cell.few
    assert cell.n_eff is not None
    assert cell.n_eff < 5
    page = report.present()
    assert page.findings[0].mark == "open"
    assert f"few questions rule that: n_eff is {cell.n_eff:.1f} of 60" in page.findings[0].sentence
    assert page.tables[0].rows[0][2].endswith("(few)")
    assert any("Few questions rule variance ratio (log p)" in caution for caution in page.cautions)
    spread = report.spreads["thinking"]["logp"]
    assert spread.top_share is not None
    assert spread.top_share > 0.6 > spread.even_top_share
    assert VarianceReport.from_json(report.to_json()) == report


def test_alike_questions_are_no_few() -> None:
    report = written(spread_questions(60))
    cell, spread = report.table3["logp_variance_ratio"], report.spreads["thinking"]["logp"]
    assert not cell.few
    assert spread.top_share == pytest.approx(spread.even_top_share, abs=0.05)
    assert not any("rule" in caution for caution in report.present().cautions)
    typical = report.table3["logp_geometric_ratio"]
    assert typical.low is not None
    assert typical.high is not None
    assert typical.low < 1 < typical.high


def test_questions_without_spread_are_counted_out_of_the_geometric_ratio() -> None:
    report = written(spread_questions(30))  # every NoThinking response is four tokens long
    assert report.without_spread == {"logp": 0, "length": 30}
    assert report.table3["length_geometric_ratio"].value is None
    assert report.table3["length_variance_ratio"].value is None
    assert any("leaves out 30 of 30 questions" in caution for caution in report.present().cautions)


def test_fewer_than_20_questions_carry_a_caution() -> None:
    assert any("12 questions are few" in caution for caution in written(spread_questions(12)).present().cautions)
    assert not any("are few" in caution for caution in written(spread_questions(20)).present().cautions)


def test_one_question_holds_all_variance_without_a_trace() -> None:
    rows = [question(f"q{at}", [-3.0, -4.0, -5.0], [-1.0, -1.0, -1.0]) for at in range(25)]
    rows[3] = question("q3", [-3.0, -4.0, -5.5], [-1.0, -2.0, -4.0])
    report = written([sample for row in rows for sample in row])
    cell = report.table3["logp_variance_ratio"]
    assert cell.value is not None
    assert (cell.low, cell.high) == (None, None)
    assert report.present().tables[0].rows[0][2] == "not estimable"


def test_a_report_of_before_is_still_read() -> None:
    plain = written(spread_questions(30)).to_dict()
    for name in ("spreads", "without_spread"):
        del plain[name]
    plain["table3"] = {
        name: {end: cell[end] for end in ("value", "low", "high")}
        for name, cell in plain["table3"].items()
        if "geometric" not in name
    }
    old = VarianceReport.from_dict(plain)
    assert len(old.present().tables) == 3
    assert "geometric" not in old.markdown()


def test_positions_that_few_questions_reach_are_left_out() -> None:
    """Twelve questions; only nine write more than four tokens, and of the last ones a single one is very improbable."""
    profile = PositionProfile()
    for number in range(12):
        values = np.full(4 if number < 3 else 40, -0.5)
        values[4:] = -1e-6 if number < 11 else -50.0
        profile.add(f"q{number}", "trace", values)
    bins = profile.bins(0.95)["trace"]
    assert [(b.start, b.stop, b.tokens) for b in bins] == [(0, 1, 12), (1, 2, 12), (2, 3, 12), (3, 4, 12)]
    assert all(b.nll.value == pytest.approx(0.5) and b.nll.low is not None for b in bins)


def test_positions_of_a_handful_of_questions_have_no_band() -> None:
    profile = PositionProfile()
    for number in range(3):
        profile.add(f"q{number}", "answer", np.full(2 + (number == 2), -1.0 - number))
    bins = profile.bins(0.95)["answer"]
    assert [(b.start, b.nll.value, b.nll.low) for b in bins] == [(0, 2.0, None), (1, 2.0, None)]
