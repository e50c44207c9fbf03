"""Small tokenizers that speak the protocols of real reasoning models: their special tokens over single bytes."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, CLOSE = "<think>", "</think>"

# What the official templates do with one user message and a generation prompt, and with a finished assistant turn.
_R1_TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% else %}<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
)
R1_DISTILL = _R1_TURNS + "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
R1_0528 = _R1_TURNS + "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
EMBEDDED = _R1_TURNS + "{% if add_generation_prompt %}<｜Assistant｜><think>{% endif %}"
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PLAIN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "


def byte_tokenizer(
    template: str | None, specials: list[str], *, think_tags: bool = True, bos: str | None = None, eos: str
) -> PreTrainedTokenizerFast:
    """One token per byte, plus the given special tokens; the think tags are ordinary added tokens, as in R1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    if think_tags:
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in (THINK, CLOSE)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def r1(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the DeepSeek-R1 family."""
    return byte_tokenizer(template, [BOS, EOS, USER, ASSISTANT], bos=BOS, eos=EOS)


def qwen3() -> PreTrainedTokenizerFast:
    """A tokenizer of the Qwen3 family."""
    return byte_tokenizer(QWEN3, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>")


def plain() -> PreTrainedTokenizerFast:
    """A chat tokenizer that knows nothing of traces."""
    return byte_tokenizer(PLAIN, ["</s>"], think_tags=False, eos="</s>")
