"""The oracle training study in small: trajectories by hand, sums of its report, resume, bad input, an injected
mistake."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from bvpo_stats.cli.main import main

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle import OracleConfig, build_oracle
from bvpo_stats.lab.oracle.build import at
from bvpo_stats.lab.oracle.exact import exact_moments
from bvpo_stats.lab.oracle_training.config import DrawnModel, OracleTrainingConfig, drawn_models
from bvpo_stats.lab.oracle_training.report import OracleTrainingReport, summarise
from bvpo_stats.lab.oracle_training.run import (
    FIXED,
    METHODS,
    RUNS_FILE,
    Method,
    Setting,
    rate,
    run_oracle_training,
    train,
)


@pytest.fixture(scope="module")
def setting():
    return Setting(DrawnModel(0, 2, 1.0, 3, judges=False))


def test_the_draw_is_written_down():
    """The committed study's models: whoever changes the draw changes this line."""
    drawn = [(model.prompts, model.oracle_seed) for model in drawn_models(24, OracleTrainingConfig().draw_seed)]
    assert drawn == [(3, 830), (6, 360), (2, 702), (4, 860), (4, 641), (3, 548), (2, 762), (2, 716), (7, 467), (7, 572),
                     (8, 746), (8, 63), (2, 646), (7, 736), (7, 398), (7, 507), (3, 228), (7, 650), (8, 971), (7, 298),
                     (5, 462), (3, 891), (8, 551), (3, 421)]  # fmt: skip
    models = drawn_models(24, 14)
    assert [model.judges for model in models] == 12 * [False] + 12 * [True]
    for beta in (1.0, 0.1):
        assert sum(model.beta == beta and model.judges for model in models) == 6


def test_losses_and_smoothness_are_the_oracles(setting):
    oracle = build_oracle(OracleConfig(n_symbols=2, max_trace=2, n_answers=3, n_prompts=2, seed=3))
    theta = oracle.theta + 0.1 * np.random.default_rng(0).normal(size=len(oracle.theta))
    loss, gradient = setting.loss_and_gradient(torch.tensor(theta[None], dtype=torch.float32))
    exact = exact_moments(at(oracle, theta), Objective(beta=1.0))
    assert float(loss[0]) == pytest.approx(exact.loss_m, rel=1e-5)
    np.testing.assert_allclose(gradient[0], exact.mu, atol=1e-5)


def test_schedule_is_that_of_transformers():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, 25)
    for step in range(25):
        assert rate(step, 25) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_weight_decay_and_the_first_step(setting):
    """Decay moves the end; the learning rate is 0 at the first step, so a quarter of the way nothing has moved."""
    rows = train(setting, "adamw-decay", 4, [FIXED[4]], range(1), 8)
    again = train(setting, "adamw", 4, [FIXED[4]], range(1), 8)
    assert rows[2]["losses"][-1] != again[2]["losses"][-1]
    assert rows[0]["losses"][0] == pytest.approx(rows[0]["loss_start"], rel=1e-6)


def test_estimated_rules_run_trains_own_path(setting, monkeypatch):
    """No second implementation: a broken rule breaks the study."""
    from bvpo_stats.training.alpha.rules import RULES
    from bvpo_stats.training.alpha.rules.base import Decision

    class Broken:
        name, keeps_empty = "rising", False

        def decide(self, seen, level):
            return Decision(np.full(seen.alpha.shape, 0.123))

    monkeypatch.setitem(RULES, "rising", Broken())
    rows = train(setting, "adamw", 4, [Method("rising", "estimated", "rising")], range(1), 4)
    assert set(rows[0]["alpha_curve"]) == {0.123}


def row(method, model, size, end):
    common = {"optimizer": "sgd", "horizon": 25, "model": model, "method": method, "size": size, "seed": 0}
    return common | {"eta": 0.1, "losses": [1.0, 0.8, end], "grad_sq": [1.0, 1.0, end], "alpha_curve": [0.5],
                     "eta_l": None, "loss_start": 1.0}  # fmt: skip


def test_sums_by_hand():
    ends = {"alpha = 0.5": (0.50, 0.40), "alpha = 1": (0.40, 0.44), "rising": (0.44, 0.40)}
    rows = [row(name, model, 0, end) for name, both in ends.items() for model, end in zip((0, 1), both, strict=True)]
    settings = OracleTrainingConfig(models=4, optimizers=("sgd",), horizons=(25,)).to_dict()
    methods = [{"name": name, "source": "fixed", "line": (0.5, 0.5)} for name in ends]
    report = OracleTrainingReport.of(settings, methods, rows, 4)
    found = report.summary("sgd", "choose")["methods"]["rising"]
    assert found["over_best"]["mean"] == pytest.approx((0.1 + 0.0) / 2)
    assert found["over_dpo"]["mean"] == pytest.approx((0.1 - 0.4 / 4.4) / 2, rel=1e-4)
    assert found["worst"] == pytest.approx(0.1)
    assert found["at_or_below"] == 0.5
    assert report.summary("sgd", "judge") is None
    assert "2 of 4 settings are done" in report.present().cautions[0]
    assert summarise(report.cells, ["rising"], "sgd", "choose", 0.95) is None


def test_a_resumed_study_is_the_uninterrupted_one(tmp_path):
    config = OracleTrainingConfig(optimizers=("adamw",), models=2, horizons=(5,), seeds=2)
    methods = (FIXED[2], FIXED[4], METHODS[8])
    whole = run_oracle_training(config, tmp_path / "whole", methods)
    assert len(whole.cells) == 6
    run_oracle_training(config, tmp_path / "killed", methods)
    log = tmp_path / "killed" / RUNS_FILE
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:20]))
    (tmp_path / "killed" / "report.json").unlink()
    assert run_oracle_training(config, tmp_path / "killed", methods) == whole
    written = (tmp_path / "killed" / "report.json").read_text()
    assert json.loads(written)["study"] == "oracle-training"
    assert OracleTrainingReport.from_json(written).to_json() == written
    assert "## " in (tmp_path / "killed" / "report.md").read_text()
    with pytest.raises(UserError, match="different run"):
        run_oracle_training(replace(config, horizons=(6,)), tmp_path / "killed", methods)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1"], "be 2 to 10,000"),
        (["--horizons", "long"], "whole numbers separated by commas"),
        (["--horizons", "3"], "at least 4"),
        (["--optimizers", "lion"], "choose among adamw, sgd"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--models", "0"], "at least 1"),
    ],
)
def test_bad_input(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["oracle-training", "--output", str(tmp_path / "run"), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
