"""The oracle training study in small: goals by hand, resume, bad input, and an error that must show."""

import json

import numpy as np
import pytest
from bvpo_stats.cli.main import main

from bvpo_stats.errors import UserError
from bvpo_stats.lab.oracle.build import at, build_oracle
from bvpo_stats.lab.oracle.exact import exact_moments
from bvpo_stats.lab.oracle_training.config import OracleTrainingConfig
from bvpo_stats.lab.oracle_training.report import OracleTrainingReport, summary
from bvpo_stats.lab.oracle_training.run import (
    ADAPTIVE,
    FIXED,
    RUNS_FILE,
    Method,
    Setting,
    run_oracle_training,
    train,
)


def config(**changes):
    values = {"eta_l": (0.2,), "seeds": 2, "steps": 6, "probe_prompts": 24, "traces": 2, "probe_every": 3}
    return OracleTrainingConfig(**{"max_trace": 1, **values, **changes})


def test_trajectories_are_those_of_plain_sgd():
    """One step by hand: the exact norm of the gradient before and after, from the oracle rebuilt at each theta."""
    setting = Setting.of(config(steps=2))
    row = train(setting, [FIXED[2]], 0.01, [5])[0]
    oracle = build_oracle(config().oracle)
    start = exact_moments(oracle, setting.objective)
    assert row["grad_sq_curve"][0] == pytest.approx(start.mu @ start.mu, rel=1e-9)
    assert row["loss_start"] == pytest.approx(start.loss_m, rel=1e-9)
    assert row["grad_sq_curve"][1] != row["grad_sq_curve"][0]
    still = exact_moments(at(oracle, oracle.theta), setting.objective)
    np.testing.assert_allclose(still.mu, start.mu, atol=1e-12)


def test_a_wrong_step_size_loses():
    """alpha from exact moments, and the same with eta L taken a hundred times too large: the error must show."""
    setting = Setting.of(config(max_trace=2, steps=40))
    eta = 0.2 / setting.smoothness()
    right = Method("exact", "exact", criterion="error", curvature="norm")
    wrong = Method("wrong", "exact", criterion="error", curvature="norm", eta_l_factor=100.0)
    rows = train(setting, [right, wrong], eta, range(4))
    ours, theirs = ([row["grad_sq"] for row in part] for part in (rows[:4], rows[4:]))
    difference = np.array(theirs) - np.array(ours)
    assert difference.mean() > 3 * difference.std(ddof=1) / 2


def test_goals_by_hand():
    def row(method, seed, grad_sq):
        plain = {"loss_start": 1.0, "loss_end": 0.5, "bias_sq": 0.1, "variance": 0.2, "alpha": 0.5, "held": 0.0}
        plain |= {"smoothness": 1.0, "smoothness_mean": 1.0, "noise_curvature": 0.1, "eta": 0.1, "eta_l": 0.2}
        return plain | {
            "method": method,
            "seed": seed,
            "grad_sq": grad_sq,
            "grad_sq_curve": [1.0] * 10,
            "alpha_curve": [0.5] * 10,
        }

    values = {"alpha = 0.5": (1.0, 1.2), "alpha = 1": (0.9, 1.0), "adaptive": (0.8, 0.95)}
    rows = [row(name, seed, x) for name, both in values.items() for seed, x in enumerate(both)]
    (found,) = summary(rows, 0.95, steps=10)
    assert found["best_fixed"] == "alpha = 1"
    assert found["comparisons"]["adaptive"]["minus_best_fixed"]["value"] == pytest.approx(-0.075)
    assert found["comparisons"]["adaptive"]["over_paper"]["value"] == pytest.approx(1.75 / 2.2)
    assert found["at_or_below_best_fixed"]
    assert found["ten_percent_below_paper"]
    # Theorem 3: 2 (1 - 0.5) / (10 * 0.1) + 0.1 + 0.1 * 1 * 0.2
    assert found["methods"]["adaptive"]["bound"]["value"] == pytest.approx(1.0 + 0.1 + 0.02)


def test_a_resumed_study_is_the_uninterrupted_one(tmp_path):
    methods = (FIXED[2], FIXED[4], ADAPTIVE)
    whole = run_oracle_training(config(), tmp_path / "whole", methods)
    assert set(whole.results[0]["methods"]) == {"alpha = 0.5", "alpha = 1", "adaptive"}
    run_oracle_training(config(), tmp_path / "killed", methods)
    log = tmp_path / "killed" / RUNS_FILE
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]))
    (tmp_path / "killed" / "report.json").unlink()
    assert run_oracle_training(config(), tmp_path / "killed", methods) == whole
    written = (tmp_path / "killed" / "report.json").read_text()
    assert json.loads(written)["study"] == "oracle-training"
    assert OracleTrainingReport.from_json(written).to_json() == written
    assert "## " in (tmp_path / "killed" / "report.md").read_text()
    with pytest.raises(UserError, match="different run"):
        run_oracle_training(config(steps=7), tmp_path / "killed", methods)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1"], "at least 2"),
        (["--eta-l", "fast"], "numbers separated by commas"),
        (["--eta-l", "-1"], "positive numbers"),
        (["--batch-size", "1"], "at least 2 pairs"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_bad_input(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["oracle-training", "--output", str(tmp_path / "run"), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
