"""Every public plot function draws on axes that it is given, or makes its own, and returns them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes

from bvpo_stats.errors import UserError
from bvpo_stats.pages.runs import find_runs
from bvpo_stats.studies import style
from bvpo_stats.studies.evaluate.figures import plot_differences, plot_scores
from bvpo_stats.studies.style import ESTIMATE, across, curves, estimates, forest, on

RUNS = {run.name: run for run in find_runs(Path(__file__).parents[2] / "figures")}
MODULES = {
    "alpha-star": "studies.alpha_star",
    "evaluate": "studies.evaluate",
    "train": "studies.train",
    "variance": "studies.variance",
    "oracle-training": "lab.oracle_training",
    "theorems": "lab.theorems",
}


def plots() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    for name, place in MODULES.items():
        for key, function in vars(import_module(f"bvpo_stats.{place}.figures")).items():
            if key.startswith("plot_"):
                yield name, key, function


def topic(function: Callable[..., Any]) -> str:
    from bvpo_stats.lab.theorems.figures import _FIGURES

    return next(topic for topic, plot in _FIGURES.values() if plot is function)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.mark.parametrize("name", MODULES)
def test_plots_draw_on_the_axes_that_they_are_given(name: str) -> None:
    report = RUNS[name].read()
    for _, key, function in (plot for plot in plots() if plot[0] == name):
        if key in ("plot_differences", "plot_trace_weights"):
            continue  # the committed runs have no such data; below
        shown: Any = report
        if name == "theorems":
            shown = next(found.data for found in report.topics if found.name == topic(function))
        parameter = list(inspect.signature(function).parameters)[1]
        assert parameter in ("ax", "axes"), key
        several = parameter == "axes"
        own = function(shown)
        assert (isinstance(own, list) and all(isinstance(ax, Axes) for ax in own)) if several else isinstance(own, Axes)
        _, made = plt.subplots(1, len(own) if several else 1, squeeze=False)
        given = list(made.flat) if several else made[0, 0]
        drawn = function(shown, given)
        assert drawn == given, key
        for ax in drawn if several else [drawn]:
            assert ax.has_data(), key
            assert ax.get_xlabel(), key
            assert ax.get_title(), key


def test_trace_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from bvpo_stats.studies.alpha_star.figures import plot_trace_weights

    report = RUNS["alpha-star"].read()
    answers = {"ess": [1.0, 2.5, 4.0], "anchor_gap": [None, None, None]}
    for key, value in {"answers": answers, "traces_per_answer": 3, "log_traces": 1.1}.items():
        monkeypatch.setitem(report.marginal.__dict__, key, value)
    assert plot_trace_weights(report).get_ylabel() == "Answers"
    answers["anchor_gap"] = [0.5, 1.0, None]
    assert plot_trace_weights(report).get_ylabel() == "Effective traces"


def test_several_models_and_what_the_paper_prints(tmp_path: Path) -> None:
    report = RUNS["evaluate"].read()
    scores = report.scores["base"]
    models = dict.fromkeys(("base", "one", "two"), report.models["base"])
    printed = {name: {"thinking": {"embedded": 50.0}} for name in ("base", "BVPO")}
    several = replace(
        report,
        models=models,
        scores=dict.fromkeys(models, scores),
        differences={"one": scores, "two": scores},
        published={"model": "A model", "scores": printed},
    )
    thinking, nothinking = several.plot(tmp_path) and plot_scores(several)
    assert [line.get_label() for line in thinking.lines if "paper" in line.get_label()] == [
        "A model, paper",
        "BVPO, paper",
    ]
    assert not [line for line in nothinking.lines if "paper" in line.get_label()]
    assert {path.name for path in tmp_path.iterdir()} == {"scores.png", "differences.png"}
    left, _ = plot_differences(several)
    shown = sorted(x for line in left.lines for x in line.get_xdata() if len(line.get_xdata()) == 1)
    np.testing.assert_allclose(shown, [100 * scores["thinking"]["embedded"].value] * 2)


def test_a_wrong_number_of_axes_is_refused() -> None:
    with pytest.raises(UserError, match="has 2 panels; 1 axes were given"), across([plt.figure().subplots()], 2):
        pass


def test_a_curve_shows_what_it_is_given() -> None:
    """A line through the values, a band from low to high; no line at unknown values, no band without both ends."""
    rows = [
        {"at": 1, "value": 5.0, "low": 1.0, "high": 6.0},
        {"at": 2, "value": None, "low": 2.0, "high": 8.0},
        {"at": 3, "value": 4.0, "low": None, "high": 9.0},
        {"at": 4, "value": 7.0, "low": 7.5, "high": 9.0},  # an interval that leaves its estimate out stays so
    ]
    with on(None) as ax:
        curves(ax, rows, x="at")
    (line,) = (line for line in ax.lines if len(line.get_xdata()))
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(line.get_ydata(), [5, np.nan, 4, 7])
    corners = {tuple(corner) for path in ax.collections[0].get_paths() for corner in path.vertices.tolist()}
    assert {(1.0, 1.0), (1.0, 6.0), (2.0, 2.0), (2.0, 8.0), (4.0, 7.5), (4.0, 9.0)} <= corners
    assert not any(x == 3.0 and y == 9.0 for x, y in corners)


def test_a_forest_shows_what_it_is_given() -> None:
    rows = [
        {"name": "first", "value": 2.0, "low": 1.0, "high": 5.0},
        {"name": "second", "value": None, "low": 0.0, "high": 1.0},
        {"name": "third", "value": 3.0, "low": None, "high": None},
    ]
    with on(None) as ax:
        forest(ax, rows)
    points = {(x, y) for line in ax.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert {(2.0, 0.0), (3.0, 2.0), (1.0, 0.0), (5.0, 0.0), (0.0, 1.0), (1.0, 1.0)} <= points
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first", "second", "third"]


def test_unknown_ends_are_unknown() -> None:
    table = estimates([{"value": 1.0, "low": float("-inf"), "high": 2.0}])
    assert table["value"].dropna().tolist() == [1.0]
    assert ESTIMATE["estimator"](table["value"].dropna()) == 1.0


def test_without_seaborn_there_are_no_figures_and_the_report_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "seaborn", None)
    report = RUNS["variance"].read()
    with pytest.raises(UserError, match=r"pip install 'bvpo-stats\[plots\]'"):
        report.plot(tmp_path / "figures")
    (tmp_path / "run").mkdir()
    report.write(tmp_path / "run")
    assert "pip install 'bvpo-stats[plots]'" in capsys.readouterr().err
    assert (tmp_path / "run" / "report.json").exists()
    assert "## Figures" not in (tmp_path / "run" / "report.md").read_text()


def test_files_need_no_screen(tmp_path: Path) -> None:
    before = plt.get_fignums()
    style.draw_files(tmp_path, {"one": lambda: _one()})
    assert (tmp_path / "one.png").stat().st_size > 1000
    assert plt.get_fignums() == before


def _one() -> Axes:
    with on(None) as ax:
        ax.plot([0, 1], [0, 1], label="a line")
    return ax
