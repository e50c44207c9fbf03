"""Reward models: sequence classifiers that read a chat of one question and one final answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bvpo_stats.errors import UserError
from bvpo_stats.progress import stages
from bvpo_stats.records import chat_turns
from bvpo_stats.sampling.rewards.base import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class RewardModelOptions:
    """What to load and how.

    Attributes:
        source: Folder or hub id of the reward model.
        device: ``auto``, ``cpu``, ``cuda``, ...
        dtype: ``auto`` (float32 on CPU, the checkpoint's on an accelerator) or a type's name.
        trust_remote_code: Runs code shipped with the model (ArmoRM's multi-objective head needs it).
        max_tokens: Padded tokens per batch; None for 8k on a CPU and 32k on an accelerator.
    """

    source: str
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    max_tokens: int | None = None


class ModelReward:
    """Scores of a sequence-classification reward model, chat-formatted by its own tokenizer, batched by length.

    The score is the single logit of an ``AutoModelForSequenceClassification``, or the field ``score`` of the output
    where the model's own code gives one (ArmoRM's gated sum over objectives). Chats longer than the model's positions
    are left unscored.

    Raises:
        UserError: The model cannot be loaded, has no trained reward head, gives several logits and no score, or its
            tokenizer has no chat template.
    """

    text_only = True

    def __init__(self, options: RewardModelOptions) -> None:
        from bvpo_stats.model.policy import content_identity

        self._model, self._tokenizer = _load(options)
        self._options = options
        self.identity = f"model:{content_identity(options.source, options.source, self._model)}"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One score per answer; None where the chat is too long for the model."""
        from bvpo_stats.model.batching import length_batches

        chats = [self._chat_ids(answer) for answer in answers]
        longest = getattr(self._model.config, "max_position_embeddings", None)
        fitting = [i for i, ids in enumerate(chats) if longest is None or len(ids) <= longest]
        budget = self._options.max_tokens or (8_192 if self._model.device.type == "cpu" else 32_768)
        scores: list[float | None] = [None] * len(answers)
        for batch in stages(length_batches([len(chats[i]) for i in fitting], max_tokens=budget)):
            members = [fitting[i] for i in batch]
            for member, value in zip(members, self._forward([chats[i] for i in members]), strict=True):
                scores[member] = value
        return scores

    def _chat_ids(self, answer: Answer) -> list[int]:
        turns = chat_turns(answer.messages or answer.prompt)
        turns.append({"role": "assistant", "content": answer.text})
        encoded: Any = self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
        return list(encoded["input_ids"])

    def _forward(self, chats: list[list[int]]) -> list[float]:
        import torch

        config = self._model.config
        own_pad = config.pad_token_id
        # Classifiers read their score at the last token that is not padding, which they tell by its id. A checkpoint
        # without a padding token gets an id for it that occurs in none of these chats, so every last token counts.
        pad = own_pad if own_pad is not None else _unused_id(chats, config.vocab_size)
        width = max(map(len, chats))
        input_ids = torch.full((len(chats), width), pad)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(chats):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        config.pad_token_id = pad
        try:
            with torch.inference_mode():
                output = self._model(
                    input_ids=input_ids.to(self._model.device), attention_mask=mask.to(self._model.device)
                )
        finally:
            config.pad_token_id = own_pad
        return self._read(output)

    def _read(self, output: Any) -> list[float]:
        score = getattr(output, "score", None)
        values = output.logits if score is None else score
        if values.ndim == 2 and values.shape[1] != 1:
            raise UserError(
                f"`reward='model:{self._options.source}'` gives {values.shape[1]} logits, not one score. Use a model "
                "with num_labels 1; a multi-objective head with a score of its own (ArmoRM) needs "
                "`trust_remote_code=True`."
            )
        return values.reshape(len(values)).double().tolist()


def _unused_id(chats: list[list[int]], words: int) -> int:
    used = set().union(*chats)
    return next(i for i in range(words - 1, -1, -1) if i not in used)


def _load(options: RewardModelOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from bvpo_stats.model.policy import DTYPES, pick_device

    source, name = options.source, f"`reward='model:{options.source}'`"
    folder = Path(source).expanduser()
    if folder.exists() and not (folder / "config.json").exists():
        raise UserError(f"{name}: the folder has no config.json, so it holds no transformers model.")
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise UserError(f"{name}: no such folder.")
    device = pick_device(options.device)
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise UserError(f"`dtype={options.dtype!r}`: unknown. Choose auto or one of {', '.join(DTYPES)}.")
    dtype = DTYPES.get(options.dtype, torch.float32 if device.type == "cpu" else "auto")
    path = str(folder) if folder.exists() else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=options.trust_remote_code)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
        )
        model = model.to(device).eval()
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{name} ships its own code. Trust it? Allow it: `trust_remote_code=True`.") from error
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"Cannot load {name}: {reason} Check the name, the folder's files, and hub access.") from error
    if info["missing_keys"]:  # transformers fills a missing head with random numbers and a warning
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        advice = "Is it a language model? Give a reward model."
        if getattr(model.config, "auto_map", None) and not options.trust_remote_code:
            advice = "It ships its own code, which may have one: allow it, if you trust it: `trust_remote_code=True`."
        raise UserError(f"{name} has no trained reward head (missing: {missing}). {advice}")
    if tokenizer.chat_template is None:
        raise UserError(
            f"{name}: its tokenizer has no chat template, so it is unclear how it reads a question and an answer."
        )
    return model, tokenizer
