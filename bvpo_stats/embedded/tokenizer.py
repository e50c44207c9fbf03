"""The embedded model's tokenizer: R1-Distill's protocol tokens over a small byte-level BPE.

It is an ordinary ``Qwen2Tokenizer`` (a ``PreTrainedTokenizerFast``), because that is the class ``AutoTokenizer`` picks
for every Qwen2 model, whatever the tokenizer's own configuration says. Digits, signs and the task's words are one token
each; everything else falls back to bytes, so text survives encoding and decoding exactly (up to the Unicode normal form
NFC, as with Qwen2's own vocabulary).
"""

from __future__ import annotations

from tokenizers import AddedToken, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

BOS = "<｜begin▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
UNK = "<｜unk｜>"

WORDS = ("What", " is", "Compute", "First", "Then", " leaving", " Check", "Again", "The", " answer", "It")
"""Words of the task, with the blank that precedes them in running text; each is one token."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>' }}{% endif %}"
)
"""R1-Distill's shape: past reasoning is stripped, a generation prompt ends in ``<think>`` (Appendix C.3: no newline)"""


def _merges() -> list[tuple[str, str]]:
    """BPE merges that build each word from the left.

    Every merge holds a word's first character, which is a capital or a blank, so no merge applies inside another word.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        ((spelled, _),) = byte_level.pre_tokenize_str(word)
        merges.update({(spelled[:i], spelled[i]): None for i in range(1, len(spelled))})
    return list(merges)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer; the same call always gives the same ids.

    ``<think>`` and ``</think>`` are single tokens but not special ones, as in R1-Distill: decoding with
    ``skip_special_tokens=True`` keeps them.
    """
    # The protocol tokens take the first ids, then the 256 bytes, then the words and their beginnings.
    special = (PAD, UNK, BOS, EOS, USER, ASSISTANT)
    merges = _merges()
    entries = (*special, THINK_OPEN, THINK_CLOSE, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys((*entries, *(a + b for a, b in merges))))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]  # pairs are what the BPE model takes; the annotation is behind
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in (USER, ASSISTANT)])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in (THINK_OPEN, THINK_CLOSE)])
    return tokenizer


def prompt_text(question: str, *, empty_trace: bool) -> str:
    """The generation prompt of Appendix C.3: D_t form, or the D_e form with its trace closed at once."""
    return f"{BOS}{USER}{question}{ASSISTANT}{THINK_OPEN}" + (THINK_CLOSE if empty_trace else "")
