"""Log-probabilities and scores of the table against autograd through the model, sequence by sequence."""

import numpy as np
import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.lab.oracle import OracleConfig, at, build_oracle
from bvpo_stats.lab.reference_engine import reference_scores
from bvpo_stats.model.batching import TokenSequence, collate


def trainable(oracle):
    return [parameter for parameter in oracle.policy.model.parameters() if parameter.requires_grad]


def flat_gradient(value, oracle):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, trainable(oracle), retain_graph=True)]).numpy()


def joint_log_probs(oracle, prompt):
    """log pi_theta(r, y | x) of all sequences, differentiable, from full logits: no code shared with the table."""
    grammar = oracle.grammar
    head, rows = grammar.prompt_ids(prompt), []
    for trace in grammar.traces():
        for answer in range(grammar.n_answers):
            ids = torch.tensor([head + grammar.completion_ids(trace, answer)])
            law = oracle.policy.model(input_ids=ids).logits[0].log_softmax(-1)
            rows.append(sum(law[p - 1, ids[0, p]] for p in range(len(head), ids.shape[1])))
    return torch.stack(rows).reshape(grammar.n_traces, grammar.n_answers)


@pytest.mark.parametrize("name", ["at_reference", "cooled", "drifted", "default"])
def test_probabilities_sum_to_one(name, request):
    table = request.getfixturevalue(name).table
    for law in (table.policy, table.reference, table.sampling):
        np.testing.assert_allclose(np.exp(law.joint).sum(axis=(1, 2)), 1, rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.exp(law.trace).sum(axis=1), 1, rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.exp(law.answer).sum(axis=2), 1, rtol=0, atol=1e-12)
        np.testing.assert_allclose(law.posterior.sum(axis=1), 1, rtol=0, atol=1e-12)


def test_log_probs_and_scores_equal_single_sequence_autograd(drifted):
    for prompt in range(drifted.grammar.n_prompts):
        joint = joint_log_probs(drifted, prompt)
        np.testing.assert_allclose(joint.detach().numpy(), drifted.table.policy.joint[prompt], rtol=1e-12)
        for trace, answer in [(0, 0), (2, 1), (6, 2)]:
            gradient = flat_gradient(joint_log_probs(drifted, prompt)[trace, answer], drifted)
            np.testing.assert_allclose(drifted.table.scores[prompt, trace, answer], gradient, rtol=1e-10, atol=1e-13)


def test_all_scores_equal_the_reference_engine(drifted):
    grammar, model = drifted.grammar, drifted.policy.model
    answers = range(grammar.n_answers)
    completions = [grammar.completion_ids(trace, answer) for trace in grammar.traces() for answer in answers]
    for prompt in range(grammar.n_prompts):
        batch = collate([TokenSequence(grammar.prompt_ids(prompt), completion) for completion in completions])
        blocks = reference_scores(model, drifted.parameter_names, batch)
        flat = torch.cat([blocks[name].flatten(1) for name in drifted.parameter_names], dim=1).numpy()
        table = drifted.table.scores[prompt].reshape(flat.shape)
        np.testing.assert_allclose(table, flat, rtol=0, atol=1e-10 * np.abs(flat).max())


def test_scores_average_to_zero(default):
    """E_pi s = 0: the gradient of a total probability that is 1."""
    table = default.table
    mean = np.einsum("xra,xrad->xd", np.exp(table.policy.joint), table.scores)
    assert np.abs(mean).max() < 1e-10


def test_fisher_identity(drifted):
    """S(y) = E_{r|y} s equals autograd's gradient of log sum_r pi(r, y | x)."""
    for prompt in range(drifted.grammar.n_prompts):
        for answer in range(drifted.grammar.n_answers):
            marginal = torch.logsumexp(joint_log_probs(drifted, prompt)[:, answer], dim=0)
            np.testing.assert_allclose(marginal.item(), drifted.table.policy.marginal[prompt, answer], rtol=1e-12)
            gradient = flat_gradient(marginal, drifted)
            np.testing.assert_allclose(drifted.table.marginal_scores[prompt, answer], gradient, rtol=0, atol=1e-10)


def test_reference_is_the_policy_before_the_drift(at_reference, drifted):
    np.testing.assert_array_equal(at_reference.table.log_ratio, 0)
    np.testing.assert_allclose(drifted.table.reference.joint, at_reference.table.reference.joint, rtol=1e-13)
    assert np.abs(drifted.table.log_ratio).max() > 0.1


def test_temperature_reaches_the_samples_only(at_reference, cooled):
    np.testing.assert_array_equal(cooled.table.policy.joint, at_reference.table.policy.joint)
    logits = cooled.table.reference.answer  # log-probabilities are logits up to a constant
    sharper = np.exp(logits / 0.8)
    expected = sharper / sharper.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.exp(cooled.table.sampling.answer), expected, rtol=1e-12)


def test_at_moves_theta_and_nothing_else(drifted):
    before = drifted.theta.copy()
    moved = at(drifted, drifted.theta * 2)
    np.testing.assert_array_equal(moved.theta, before * 2)
    np.testing.assert_array_equal(drifted.theta, before)
    again = at(drifted, before)
    np.testing.assert_array_equal(again.table.policy.joint, drifted.table.policy.joint)
    np.testing.assert_array_equal(moved.pair_law, drifted.pair_law)
    np.testing.assert_allclose(moved.table.reference.joint, drifted.table.reference.joint, rtol=1e-13)
    with pytest.raises(UserError, match="trainable parameters"):
        at(drifted, before[1:])


def test_blocks_say_where_parameters_lie(drifted):
    named = dict(drifted.policy.model.named_parameters())
    assert list(drifted.blocks) == list(drifted.parameter_names)
    for name, block in drifted.blocks.items():
        np.testing.assert_array_equal(drifted.theta[block], named[name].detach().numpy().ravel())
    assert sum(block.stop - block.start for block in drifted.blocks.values()) == len(drifted.theta)


def test_the_seed_decides_everything():
    config = OracleConfig(n_symbols=2, max_trace=1, n_prompts=1, drift=0.1, seed=5)
    torch.manual_seed(1)
    first = build_oracle(config)
    torch.manual_seed(2)
    second = build_oracle(config)
    np.testing.assert_array_equal(first.table.scores, second.table.scores)
    np.testing.assert_array_equal(first.rewards, second.rewards)


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"temperature": -1.0}, {"drift": -0.1}])
def test_bad_configurations_are_refused(bad):
    with pytest.raises(UserError, match="must be"):
        OracleConfig(**bad)
