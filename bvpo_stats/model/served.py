"""A policy whose weights live elsewhere: its tokenizer, its template, and the tokens that end a completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import PolicyOptions, model_source
from bvpo_stats.model.templates import Template, find_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ServedPolicy:
    """What is needed to speak a policy's language without loading it.

    Attributes:
        template: Protocol and tokenizer.
        eos_ids: Tokens that end a completion; the tokenizer's own first.
    """

    template: Template
    eos_ids: tuple[int, ...]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.template.tokenizer


def load_served_policy(options: PolicyOptions) -> ServedPolicy:
    """Loads tokenizer and template; no weights are read.

    Args:
        options: ``model``, ``template``, ``empty_trace`` and ``trust_remote_code`` are used.

    Raises:
        UserError: No such model, no tokenizer, no usable template, or no end-of-sequence token.
    """
    from transformers import AutoTokenizer, GenerationConfig

    source = model_source(options.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # whatever a tokenizer's files provoke
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"Cannot load the tokenizer of `model={options.model!r}`: {reason} Check the name, the folder's files, and "
            "hub access."
        ) from error
    try:
        configured = GenerationConfig.from_pretrained(source).eos_token_id
    except Exception:  # many models ship none; the tokenizer knows its own end
        configured = None
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for extra in [configured] if isinstance(configured, int) else configured or []:
        if int(extra) not in ids:
            ids.append(int(extra))
    if not ids:
        raise UserError(f"The tokenizer of `model={options.model!r}` names no end-of-sequence token.")
    template = find_template(tokenizer, name=options.template, empty_trace=options.empty_trace)
    return ServedPolicy(template, tuple(ids))
