import numpy as np
import pytest
import torch
from scipy import stats

from bvpo_stats.errors import UserError
from bvpo_stats.lab.oracle.language import PROMPT_LENGTH, Grammar, build_tokenizer
from bvpo_stats.model.batching import TokenSequence, collate
from bvpo_stats.model.head import sequence_logprobs, token_logprobs


def test_prompts_and_completions_are_what_the_template_makes_of_them(default):
    template, grammar = default.policy.template, default.grammar
    for prompt in range(grammar.n_prompts):
        thinking = template.prompt_ids(f"q{prompt}", "thinking")
        assert thinking == grammar.prompt_ids(prompt)
        assert len(thinking) == PROMPT_LENGTH
        assert template.empty_trace_ids(f"q{prompt}") == (thinking, (grammar.close_id,))
    symbols = grammar.symbol_ids
    assert template.split(grammar.completion_ids((symbols[0], symbols[3]), 1), "thinking") == (3, "s0s3", "y1")


def test_text_outside_the_language_is_refused():
    with pytest.raises(Exception, match="UNK"):
        build_tokenizer(Grammar(2, 2, 2, 1)).encode("hello")


@pytest.mark.parametrize("sizes", [(0, 1, 2, 1), (1, -1, 2, 1), (1, 1, 1, 1), (1, 1, 2, 0)])
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(UserError, match="oracle needs"):
        Grammar(*sizes)


def test_allowed_tokens_by_hand():
    """Next-token supports along `<think> s0 s1 </think> y0 EOS` with T = 2, spelled out."""
    from bvpo_stats.lab.oracle import OracleConfig, build_oracle

    oracle = build_oracle(OracleConfig(n_symbols=2, max_trace=2, n_answers=2, n_prompts=1))
    grammar, model = oracle.grammar, oracle.policy.model
    s0, s1 = grammar.symbol_ids
    ids = torch.tensor([grammar.prompt_ids(0) + grammar.completion_ids((s0, s1), 0)])
    with torch.no_grad():
        law = model(input_ids=ids).logits[0, PROMPT_LENGTH - 1 :].softmax(-1)
    support = [set(torch.nonzero(row)[:, 0].tolist()) for row in law]
    tags = {s0, s1, grammar.close_id}
    ends = [{grammar.close_id}, set(grammar.answer_ids), {grammar.eos_id}, {grammar.eos_id}]
    assert support == [tags, tags, *ends]


def test_full_logits_and_chunked_head_agree_on_padded_batches(drifted):
    grammar, model = drifted.grammar, drifted.policy.model
    traces = grammar.traces()
    rows = [TokenSequence(grammar.prompt_ids(1), grammar.completion_ids(trace, 2)) for trace in traces]
    batch = collate(rows, pad_id=grammar.pad_id)
    with torch.no_grad():
        chunked = sequence_logprobs(token_logprobs(model, batch, chunk_tokens=3))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    full = (picked * batch.completion_mask).sum(1)
    torch.testing.assert_close(chunked, full, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(chunked.numpy(), drifted.table.policy.joint[1, :, 2], rtol=1e-12)


def test_certain_tokens_have_log_probability_exactly_zero(drifted):
    grammar = drifted.grammar
    longest = len(grammar.traces()) - 1
    rows = [TokenSequence(grammar.prompt_ids(0), grammar.completion_ids(grammar.traces()[longest], 0))]
    with torch.no_grad():
        tokens = token_logprobs(drifted.policy.model, collate(rows))[0, PROMPT_LENGTH - 1 :]
    assert tokens[2] == 0.0  # the closing tag after T = 2 symbols
    assert tokens[-1] == 0.0  # end of sequence after the answer
    assert (tokens[[0, 1, 3]] < 0).all()


def test_float32_keeps_the_grammar(drifted):
    import copy

    model = copy.deepcopy(drifted.policy.model).float()
    grammar = drifted.grammar
    rows = [TokenSequence(grammar.prompt_ids(0), grammar.completion_ids(t, 0)) for t in grammar.traces()]
    with torch.no_grad():
        scored = sequence_logprobs(token_logprobs(model, collate(rows)))
    np.testing.assert_allclose(scored.numpy(), drifted.table.policy.joint[0, :, 0], atol=1e-4)


@pytest.mark.parametrize("left_padding", [0, 3])
def test_generate_draws_the_sampling_law(cooled, left_padding):
    """Cached, token by token, adapter disabled, temperature 0.8: what a sampling engine does."""
    grammar, n = cooled.grammar, 4000
    ids = torch.tensor([(grammar.pad_id,) * left_padding + grammar.prompt_ids(1)] * n)
    mask = (ids != grammar.pad_id).long()
    torch.manual_seed(0)
    with cooled.policy.reference() as model:
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=0.8, top_k=0, top_p=1.0, max_new_tokens=8
        )
    number = {
        grammar.completion_ids(trace, answer): index * grammar.n_answers + answer
        for index, trace in enumerate(grammar.traces())
        for answer in range(grammar.n_answers)
    }
    counts = np.zeros(len(number))
    for row in out[:, ids.shape[1] :].tolist():
        counts[number[tuple(row[: row.index(grammar.eos_id) + 1])]] += 1
    expected = n * np.exp(cooled.table.sampling.joint[1]).ravel()
    assert stats.chisquare(counts, expected * (n / expected.sum())).pvalue > 1e-3
