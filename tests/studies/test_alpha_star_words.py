"""What the alpha-star report says where a number is no measurement, or rests on little."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bvpo_stats.statistics.moments import Moments
from bvpo_stats.studies.alpha_star.report import AlphaReport, AlphaSettings, Marginal

KNOWN = Marginal(method="posterior", rung="posterior traces", reason="posterior traces", estimable=True)
AT_REFERENCE = Marginal(method="reference-point", rung="reference point", reason="mu = E g_t", estimable=True)


def written(
    n: int,
    *,
    signal: float = 1.0,
    seconds: int = 0,
    marginal: Marginal = KNOWN,
    settings: AlphaSettings | None = None,
    blocks: dict[str, slice] | None = None,
) -> AlphaReport:
    """A report on normal gradients in six dimensions; ``seconds`` prompts have a second trace draw."""
    rng = np.random.default_rng(n)
    mu = np.array([signal, 0, 0, 0, 0, 0])
    vectors = {"t": mu + rng.normal(size=(n, 6)), "e": 0.5 * mu + 0.3 * rng.normal(size=(n, 6))}
    if marginal is KNOWN:
        vectors["m"] = mu + 0.3 * rng.normal(size=(n, 6))
    blocks = blocks or {"all": slice(None)}
    moments = Moments.init(tuple(vectors), tuple(blocks), None)
    ids = [f"q{i}" for i in range(n)]
    for rows, drawn in ((slice(0, seconds), True), (slice(seconds, n), False)):
        if rows.start < rows.stop:
            parts = {name: {b: x[rows, cut] for b, cut in blocks.items()} for name, x in vectors.items()}
            second = {b: x + 0.1 for b, x in parts["t"].items()} if drawn else None
            moments = moments.update(parts, ids[rows], trace2=second)
    about: dict[str, Any] = {"model": "m", "template": "t", "objective": {}, "subset": "all", "n_parameters": 6}
    return AlphaReport.of(
        moments.finalize(),
        marginal,
        settings or AlphaSettings(),
        **about,
        n_second_draws=moments.n_second_draws,
        n_drawn_prompts=moments.n_drawn_prompts,
        seed=0,
        curvature=None,
    )


def rows(report: AlphaReport) -> dict[str, tuple[str, str]]:
    return {label.strip(): cells for section in report.sections().values() for label, *cells in section}  # type: ignore[misc]


def test_trace_sampling_from_one_prompt_is_not_estimable() -> None:
    report = written(40, seconds=1)
    found = rows(report)
    assert found["of which sampling of traces"] == ["not estimable", ""]
    assert found["its share (Theorem 1), 1 of 40 prompts"] == ["not estimable", ""]
    assert "- to -" not in report.markdown()
    assert report.variance["trace_sampling"] == pytest.approx(6 * 0.1**2 / 2)  # the estimate stays in the report


def test_the_share_of_trace_sampling_says_on_how_many_prompts_it_rests() -> None:
    report = written(200, seconds=150)
    value, interval = rows(report)["its share (Theorem 1), 150 of 200 prompts"]
    assert value.endswith("%")
    assert " to " in interval
    assert any("150 of 200 examples (150 of 200 prompts)" in note for note in report.present().notes)
    assert AlphaReport.from_json(report.to_json()).n_drawn_prompts == 150
    few = rows(written(40, seconds=25))["its share (Theorem 1), 25 of 40 prompts"]
    assert few == ["0.4%", "0.3% to 0.5%"]  # on 3.8 effective prompts


def test_prompts_with_a_second_draw_are_counted_whatever_the_pairs_and_the_order() -> None:
    rng = np.random.default_rng(0)
    t, e, second = rng.normal(size=(3, 5, 2))
    for groups in (None, 3):
        one = Moments.init(("t", "e"), groups=groups).update({"t": t, "e": e}, list("aabcc"), trace2=second)
        both = one.merge(Moments.init(("t", "e"), groups=groups).update({"t": t[:2], "e": e[:2]}, list("xy")))
        assert (both.n_drawn_prompts, both.n_second_draws, both.n_prompts) == (3, 5, 5)


def test_a_gain_by_layer_holds_its_own_estimate() -> None:
    report = written(60, blocks={"a": slice(0, 3), "b": slice(3, 6)}, settings=AlphaSettings(batch_size=1.0))
    gain = report.layer_gain
    assert gain is not None
    assert gain.value is not None
    assert gain.low is not None
    assert gain.high is not None
    assert gain.low < gain.value < gain.high
    for value, low, high, open_ in ((-0.00068, -0.002, 0.0006, True), (0.3, 0.1, 0.5, False)):
        told = replace(report, layer_gain=replace(gain, value=value, low=low, high=high)).markdown()
        assert f"would save {value:.4g} ({low:.4g} to {high:.4g}) of the error" in told
        assert ("do not tell that from nothing" in told) is open_


def test_the_bias_only_limit_at_the_reference_is_an_identity() -> None:
    found = rows(written(60, marginal=AT_REFERENCE))
    for label, value in (("bias-only limit (large batches)", "1"), ("norm(b_t)^2", "0"), ("b_t . b_e", "0")):
        assert found[label][:2] == [value, "an identity here: b_t = 0"]
    assert found["norm(b_e)^2"][1].count(" to ") == 1
    weight = written(60, marginal=AT_REFERENCE).alpha_bias
    assert weight is not None
    assert weight.identity == "an identity here: b_t = 0"
    measured = rows(written(60))["bias-only limit (large batches)"]
    assert "identity" not in measured[1]


@pytest.mark.parametrize(
    ("signal", "batch", "words"),
    [(0.2, 1.0, "The zero vector has less error than any mix"), (0.3, 6.0, "not told apart"), (1.0, 128.0, None)],
)
def test_the_zero_vector_is_told_apart_or_not(signal: float, batch: float, words: str | None) -> None:
    report = written(60, signal=signal, settings=AlphaSettings(batch_size=batch))
    said = [warning for warning in report.warnings if "zero vector" in warning]
    assert len(said) == (words is not None), (report.mse, report.uncertainty["mse"])
    if words is not None:
        assert words in said[0]


def test_fewer_than_20_prompts_carry_a_caution() -> None:
    assert any("19 prompts are few" in warning for warning in written(19).warnings)
    assert not any("are few" in warning for warning in written(20).warnings)
