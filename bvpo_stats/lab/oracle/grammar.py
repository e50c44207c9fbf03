"""The finite language of the oracle: which strings exist, how they are spelled, and a tokenizer for them.

A sequence is ``BOS User q Assistant <think> r </think> y EOS`` with a question token q, a trace r of 0 .. T symbols and
a single answer token y. The language is small enough to list: sum_l V^l traces per prompt, times the number of answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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

PROMPT_LENGTH = 5
"""Tokens of every prompt: BOS, User, question, Assistant, ``<think>``."""


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
