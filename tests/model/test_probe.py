"""Gradients of all Linear weights through a Gaussian probe: exactly dL/dW A', and alpha with the error of the draw."""

from typing import Any

import numpy as np
import pytest
import torch
from bvpo_stats.cli.main import app
from torch import nn

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.stream import pair_gradients
from bvpo_stats.model.batching import TokenSequence, collate
from bvpo_stats.model.policy import load_policy
from bvpo_stats.model.scores import check_scores, score_pass
from bvpo_stats.model.sinks import Keep
from bvpo_stats.model.subset import Probe, linear_subset, probe_subset, uncovered_share
from bvpo_stats.statistics.alpha import alpha_from_summary
from bvpo_stats.statistics.estimates import LinearRatio
from bvpo_stats.statistics.moments import summary_of_arrays
from bvpo_stats.studies.alpha_star.config import AlphaInputs
from bvpo_stats.studies.alpha_star.run import alpha_star, load_examples
from tests.model.shapes import tiny_model

BATCH = collate([TokenSequence((5, 6), tuple(range(7, 12 + k))) for k in range(3)], pad_id=0)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_scores_are_the_full_ones_times_a(kind: str) -> None:
    model = tiny_model(kind).double().eval()
    subset = probe_subset(model, Probe(4, 3))
    full, seen = Keep(), Keep()
    score_pass(model, linear_subset(model, [site.name for site in subset.sites]), BATCH, [full])
    score_pass(model, subset, BATCH, [seen])
    assert set(seen.scores) == set(full.scores)
    for name, scores in full.scores.items():
        expected = torch.stack([subset.seen(name, score) for score in scores])
        assert tuple(seen.scores[name].shape[1:]) == subset.shapes[name] == (expected.shape[1], 4)
        torch.testing.assert_close(seen.scores[name], expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert check_scores(model, subset, BATCH) < 1e-9
    assert 0 < uncovered_share(model, subset) < 1
    other = probe_subset(model, Probe(4, 4))
    name = next(iter(subset.parameters))
    assert not torch.equal(subset.probe.matrix(name, 8), other.probe.matrix(name, 8))
    mean = torch.stack([a.T @ a for a in (Probe(4, seed).matrix(name, 5) for seed in range(800))]).mean(dim=0)
    torch.testing.assert_close(mean, torch.eye(5, dtype=torch.float64), rtol=0, atol=0.1)  # 4 of its standard errors


def test_half_precision_keeps_a_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2").eval()
    exact, found = Keep(), Keep()
    score_pass(model, probe_subset(model), BATCH, [exact])
    score_pass(model.bfloat16(), probe_subset(model), BATCH, [found])
    assert all(scores.dtype == torch.float32 for scores in found.scores.values())
    one, two = (torch.cat([keep.scores[name].flatten() for name in exact.scores]) for keep in (exact, found))
    assert float((one - two).norm() / one.norm()) < 0.1


def test_what_no_linear_layer_holds_is_refused_with_its_share() -> None:
    model: Any = tiny_model("qwen2")
    model.model.layers[0].mlp.experts = nn.Parameter(torch.zeros(2, 8, 8))
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts is none: \d+\.\d% of the parameters"):
        probe_subset(model)
    assert probe_subset(model, None, ["q_proj"]).size > 0
    with pytest.raises(UserError, match="probe_rank"):
        Probe(1)


@pytest.fixture(scope="module")
def pairs() -> list[Any]:
    return [pair for example in load_examples(AlphaInputs(limit=104)).examples for pair in example.both]


@pytest.mark.slow
def test_alpha_of_all_weights_and_what_the_draw_adds(pairs: list[Any]) -> None:
    """Five draws were .19 standard errors from the exact alpha (root mean square); here one."""
    policy = load_policy("embedded", dtype="float32", device="cpu")
    exact = alpha_star(policy, pairs, theta="*_proj", batch_size=4, groups=20).alpha_star
    report = alpha_star(policy, pairs, theta="probe", probe_rank=8, seed=2, batch_size=4, groups=20)
    error = (exact.unclipped_high - exact.unclipped_low) / 4
    assert abs(report.alpha_star.unclipped - exact.unclipped) < 0.3 * error
    assert report.n_parameters == 688_128
    assert "Gaussian probe of rank 8 (seed 2); 5.7% of the model's parameters" in report.subset
    g = pair_gradients(policy, pairs, theta="probe", probe_rank=8, options=StreamOptions(seed=2))
    assert g.t.shape[1] < report.n_parameters / 10

    def summary(t: Any, e: Any, blocks: dict[str, slice] | None) -> Any:
        return summary_of_arrays({"t": t, "e": e}, clusters=g.prompt_ids, blocks=blocks, groups=20)

    plain, found = alpha_from_summary(summary(g.t, g.e, g.blocks), batch_size=4), report.alpha_star
    assert found.unclipped == pytest.approx(plain.unclipped, rel=1e-5)
    values = []
    for row in range(8):  # each row of A left out, by hand: the others' inner products
        t, e = (np.delete(x.reshape(len(x), -1, 8), row, axis=2).reshape(len(x), -1) for x in (g.t, g.e))
        values.append(LinearRatio.alpha(summary(t, e, None), 0.25))
    left = np.array([ratio.numerator[0] / ratio.denominator[0] for ratio in values])
    added = 7 / 8 * np.sum((left - left.mean()) ** 2)
    reach = 2.3646 * added**0.5  # Student's t with 7 degrees of freedom
    for end, without in ((found.unclipped_low, plain.unclipped_low), (found.unclipped_high, plain.unclipped_high)):
        assert abs(end - plain.unclipped) == pytest.approx(np.hypot(without - plain.unclipped, reach), rel=1e-4)
    assert f"the draw of the probe moves alpha by about {added**0.5:.2g}" in report.subset


def test_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["alpha-star", "--limit", "6", "--device", "cpu", "--output", str(tmp_path / "run")]
    app([*run, "--theta", "probe", "--probe-rank", "4", "--params", "q_proj"], standalone_mode=False)
    assert "weights of q_proj, seen through a Gaussian probe of rank 4" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(UserError, match="different run"):
        app([*run, "--theta", "probe", "--probe-rank", "8", "--params", "q_proj"], standalone_mode=False)
    for wrong, words in (
        (["--theta", "probe", "--optimizer", "sgd", "--learning-rate", "1"], "--optimizer needs the gradients"),
        (["--theta", "q_porj"], r"matches no layer.*q_proj"),
        (["--theta", ""], "--theta"),
        (["--theta", "probe", "--probe-rank", "1"], "--probe-rank 1"),
    ):
        with pytest.raises(UserError, match=words):
            app(["alpha-star", *wrong, "--output", str(tmp_path / "other")], standalone_mode=False)
