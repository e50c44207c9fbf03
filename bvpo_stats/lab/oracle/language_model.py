"""A Qwen2 causal LM whose next-token law is restricted to a grammar, by nothing but hidden states and head weights.

The grammar must hold on every path from hidden states to log-probabilities: full logits, a chunked head, ``generate``.
So it is not a mask applied somewhere after the logits. The decoder appends a one-hot code of the grammar's state to its
last hidden state, and the head has, for each state, a fixed column that puts :data:`FORBIDDEN` on the tokens the state
rules out. In floating point exp(FORBIDDEN) is exactly 0, so forbidden tokens have probability exactly 0,
a certain token has log-probability exactly 0, and every gradient stays finite.

An oracle in float64 needs float64 throughout, while the library's Qwen2 computes its norms in float32 whatever the
model's dtype. They are swapped for norms that keep the dtype they are given. (The library's eager attention takes its
softmax in float32 too; its SDPA attention does not.)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from bvpo_stats.lab.oracle.grammar import PROMPT_LENGTH, Grammar

FORBIDDEN = -1.0e4
"""Logit offset of a forbidden token; exp(-1e4 / temperature) underflows to 0 at any temperature below about 13."""

FREE, TRACE, FULL, ANSWER, END = range(5)
"""States: inside the prompt, trace may go on, trace has T symbols, answer is due, sequence is over."""

N_STATES = 5


class GrammarDecoder(Qwen2Model):
    """Qwen2's decoder; its last hidden state carries the grammar's state in :data:`N_STATES` extra coordinates."""

    def __init__(self, config: Qwen2Config, grammar: Grammar):
        super().__init__(config)
        self.grammar = grammar
        self.norm = _norm(config)
        for layer in self.layers:
            layer.input_layernorm, layer.post_attention_layernorm = _norm(config), _norm(config)

    def forward(
        self,
        input_ids: Int[Tensor, "sequences tokens"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "sequences tokens"] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As Qwen2Model.forward, on token ids only; the last hidden state is [sequences, tokens, hidden + states]."""
        if input_ids is None:
            raise ValueError(
                "A grammar-restricted model reads token ids; inputs_embeds do not tell it where it stands."
            )
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        states = grammar_states(self.grammar, input_ids, position_ids if cached else None)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden = output.last_hidden_state
        code = torch.eye(N_STATES, dtype=hidden.dtype, device=hidden.device)[states]
        output.last_hidden_state = torch.cat([hidden, code], dim=-1)
        return output


class GrammarLM(Qwen2ForCausalLM):
    """Qwen2ForCausalLM over a :class:`GrammarDecoder`, with the forbidden tokens written into its head's weight."""

    def __init__(self, config: Qwen2Config, grammar: Grammar):
        super().__init__(config)
        self.model = GrammarDecoder(config, grammar)
        self.lm_head = nn.Linear(config.hidden_size + N_STATES, config.vocab_size, bias=False)
        self.set_attn_implementation("sdpa")
        self.write_grammar()

    @torch.no_grad()
    def write_grammar(self) -> None:
        """Puts the grammar's columns into the head's weight (again), after anything that overwrote them."""
        self.lm_head.weight[:, -N_STATES:] = forbidden_offsets(self.model.grammar).to(self.lm_head.weight)


def grammar_states(
    grammar: Grammar,
    input_ids: Int[Tensor, "sequences tokens"],
    position_ids: Int[Tensor, "sequences tokens"] | None = None,
) -> Int[Tensor, "sequences tokens"]:
    """State of the grammar after each token, which decides what may come next.

    Args:
        grammar: The language.
        input_ids: Token ids, from the start of the sequence unless ``position_ids`` is given. Padding on either side
            is harmless: it is no trace symbol.
        position_ids: Positions of the tokens, for a continuation whose beginning is in a cache. All prompts have the
            same length, so the position tells how long the trace is.
    """
    is_symbol = (input_ids >= grammar.symbol_ids.start) & (input_ids < grammar.symbol_ids.stop)
    is_answer = (input_ids >= grammar.answer_ids.start) & (input_ids < grammar.answer_ids.stop)
    length = is_symbol.cumsum(-1) if position_ids is None else position_ids - (PROMPT_LENGTH - 1)
    in_trace = torch.where(length < grammar.max_trace, TRACE, FULL)
    states = torch.full_like(input_ids, FREE)
    states = torch.where(is_symbol | (input_ids == grammar.open_id), in_trace, states)
    states = torch.where(input_ids == grammar.close_id, ANSWER, states)
    return torch.where(is_answer | (input_ids == grammar.eos_id), END, states)


def forbidden_offsets(grammar: Grammar) -> Float[Tensor, "vocabulary states"]:
    """Logit offsets by token and state: 0 where allowed, :data:`FORBIDDEN` elsewhere."""
    offsets = torch.full((grammar.vocabulary, N_STATES), FORBIDDEN, dtype=torch.float64)
    offsets[:, FREE] = 0.0
    offsets[list(grammar.symbol_ids), TRACE] = 0.0
    offsets[grammar.close_id, [TRACE, FULL]] = 0.0
    offsets[list(grammar.answer_ids), ANSWER] = 0.0
    offsets[grammar.eos_id, END] = 0.0
    return offsets


def _norm(config: Qwen2Config) -> Any:
    return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
