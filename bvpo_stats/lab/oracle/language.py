"""The finite language of the oracle, its tokenizer, and a Qwen2 that speaks nothing else.

A sequence is ``BOS User q Assistant <think> r </think> y EOS`` with a question token q, a trace r of 0 .. T symbols and
a single answer token y. The language is small enough to list: sum_l V^l traces per prompt, times the number of answers.

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

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from bvpo_stats.errors import UserError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
PAD = "<｜▁pad▁｜>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

_PROTOCOL = (PAD, BOS, EOS, USER, ASSISTANT, THINK_OPEN, THINK_CLOSE)
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<｜User｜>' + message['content'] }}{% else %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>' }}{% endif %}"
)

MOST_TOKENS = 1_000_000
"""Tokens of all sequences that an oracle may have; the scores of that many fill some hundred megabytes."""

PROMPT_LENGTH = 5
"""Tokens of every prompt: BOS, User, question, Assistant, ``<think>``."""

ANSWER_TOKENS = 2
"""Tokens of an answer, end of sequence included: the length of y where an objective averages log pi(y | x)."""


@dataclass(frozen=True)
class Grammar:
    """Sizes of the language and its token ids.

    The ids are laid out as protocol tokens, then V trace symbols ``s0 ..``, answers ``y0 ..``, questions ``q0 ..``.

    Attributes:
        n_symbols: V, the number of trace symbols.
        max_trace: T, the longest trace; after T symbols the closing tag is certain.
        n_answers: Number of answers, at least 2.
        n_prompts: Number of questions.

    Raises:
        UserError: A size is out of range.

    >>> grammar = Grammar(n_symbols=4, max_trace=4, n_answers=3, n_prompts=1)
    >>> grammar.n_traces
    341
    """

    n_symbols: int
    max_trace: int
    n_answers: int
    n_prompts: int

    def __post_init__(self) -> None:
        if self.n_symbols < 1 or self.max_trace < 0 or self.n_prompts < 1:
            raise UserError("An oracle needs at least one trace symbol, one prompt and max_trace >= 0.")
        if self.n_answers < 2:
            raise UserError("An oracle needs at least two answers; with one there is nothing to prefer.")
        bits = self.max_trace * math.log2(self.n_symbols)  # V^T is not formed before it is known to be small
        count = math.inf if bits > 64 else self.n_prompts * self.n_answers * self.n_traces
        if count * (PROMPT_LENGTH + self.max_trace + 3) > MOST_TOKENS or self.vocabulary > MOST_TOKENS:
            size = f"over 10^{math.floor(bits * math.log10(2))}" if count == math.inf else f"{count:,}"
            raise UserError(
                f"{self.n_prompts} prompts, {self.n_symbols} trace symbols and traces of up to {self.max_trace} make "
                f"{size} sequences, every one of which is scored. Choose smaller sizes: up to {MOST_TOKENS:,} tokens "
                "of sequences are enumerated."
            )

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return _PROTOCOL.index(PAD)

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token."""
        return _PROTOCOL.index(EOS)

    @property
    def open_id(self) -> int:
        """Id of ``<think>``."""
        return _PROTOCOL.index(THINK_OPEN)

    @property
    def close_id(self) -> int:
        """Id of ``</think>``."""
        return _PROTOCOL.index(THINK_CLOSE)

    @property
    def symbol_ids(self) -> range:
        """Ids of the trace symbols."""
        return range(len(_PROTOCOL), len(_PROTOCOL) + self.n_symbols)

    @property
    def answer_ids(self) -> range:
        """Ids of the answers."""
        return range(self.symbol_ids.stop, self.symbol_ids.stop + self.n_answers)

    @property
    def question_ids(self) -> range:
        """Ids of the questions."""
        return range(self.answer_ids.stop, self.answer_ids.stop + self.n_prompts)

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.question_ids.stop

    @property
    def n_traces(self) -> int:
        """R = sum_{l=0}^{T} V^l, the number of traces of a prompt."""
        return sum(self.n_symbols**length for length in range(self.max_trace + 1))

    def words(self) -> list[str]:
        """Spelling of every token, by id."""
        symbols = [f"s{i}" for i in range(self.n_symbols)]
        answers = [f"y{i}" for i in range(self.n_answers)]
        questions = [f"q{i}" for i in range(self.n_prompts)]
        return [*_PROTOCOL, *symbols, *answers, *questions]

    def prompt_ids(self, prompt: int) -> tuple[int, ...]:
        """Token ids of prompt number ``prompt``, template included (the D_t form, ending in ``<think>``)."""
        ids = [_PROTOCOL.index(token) for token in (BOS, USER, ASSISTANT, THINK_OPEN)]
        return (ids[0], ids[1], self.question_ids[prompt], ids[2], ids[3])

    def traces(self) -> list[tuple[int, ...]]:
        """Every trace as symbol ids without the closing tag, shortest first; the empty trace is number 0."""
        return [trace for length in range(self.max_trace + 1) for trace in product(self.symbol_ids, repeat=length)]

    def completion_ids(self, trace: tuple[int, ...], answer: int) -> tuple[int, ...]:
        """Token ids of (r, y): trace, closing tag, answer number ``answer``, end of sequence."""
        return (*trace, self.close_id, self.answer_ids[answer], self.eos_id)


def build_tokenizer(grammar: Grammar) -> PreTrainedTokenizerFast:
    """A fast tokenizer for the language with a chat template in R1-Distill's protocol.

    ``<think>`` and ``</think>`` are single tokens but not special ones, as in R1-Distill. Unknown text raises in
    ``tokenizers``: nothing outside the language has a meaning here.

    >>> tokenizer = build_tokenizer(Grammar(2, 2, 2, 1))
    >>> tokenizer.decode(tokenizer.encode("s0s1</think>y1", add_special_tokens=False))
    's0s1</think>y1'
    """
    words = grammar.words()
    core = Tokenizer(models.WordLevel(vocab={word: index for index, word in enumerate(words)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[sqy][0-9]+"), behavior="isolated")
    core.decoder = decoders.Fuse()
    special = (PAD, BOS, EOS, USER, ASSISTANT)
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in (THINK_OPEN, THINK_CLOSE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


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
