"""Measures what the embedded model must leave to align and to measure: accuracies, trace lengths, distinct answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bvpo_stats.embedded.assets import embedded_prompts
from bvpo_stats.embedded.task import parse_answer
from bvpo_stats.embedded.tokenizer import THINK_CLOSE, prompt_text
from bvpo_stats.errors import UserError
from bvpo_stats.lab.recipe.train import MAX_NEW_TOKENS
from bvpo_stats.records import MODES, Mode, Prompt


@dataclass(frozen=True)
class Draw:
    """One sampled response: its value (None without one), number of trace tokens and whether it ended by itself."""

    prompt: int
    mode: Mode
    value: int | None
    trace_tokens: int
    finished: bool


@dataclass(frozen=True)
class Measures:
    """The measured bounds, with standard errors clustered by prompt.

    Attributes:
        thinking_accuracy: Share of correct values with a trace.
        thinking_error: Its standard error.
        nothinking_accuracy: Share of correct values with the empty trace.
        nothinking_error: Its standard error.
        gap: ``thinking_accuracy - nothinking_accuracy``.
        gap_error: Its standard error, paired by prompt.
        trace_p5: 5th percentile of the traces' token count, closing tag left out.
        trace_p95: 95th percentile.
        trace_spread: ``trace_p95 / trace_p5``.
        distinct_share: Share of prompts with more than one value among their samples with a trace.
        distinct_error: Its standard error.
        unfinished_share: Share of responses cut at the token limit, both modes.
        n_prompts: Prompts measured.
        n_samples: Samples per prompt and mode.
    """

    thinking_accuracy: float
    thinking_error: float
    nothinking_accuracy: float
    nothinking_error: float
    gap: float
    gap_error: float
    trace_p5: float
    trace_p95: float
    trace_spread: float
    distinct_share: float
    distinct_error: float
    unfinished_share: float
    n_prompts: int
    n_samples: int


@torch.no_grad()
def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], temperature: float
) -> Int[Tensor, "sequences tokens"]:
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    written = model.generate(  # type: ignore[operator]  # the mixin's stub hides the method
        **{name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")},
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return written[:, encoded["input_ids"].shape[1] :]


def draw_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    *,
    n_samples: int = 5,
    temperature: float = 0.8,
    seed: int = 0,
    batch_prompts: int = 40,
) -> Iterator[Draw]:
    """Samples ``n_samples`` responses per prompt and mode; easy prompts share batches, so little is padded.

    The draws depend on ``seed`` and on ``batch_prompts``.
    """
    close = tokenizer.convert_tokens_to_ids(THINK_CLOSE)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].prompt), i))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for mode in MODES:
            for start in range(0, len(order), batch_prompts):
                rows = [i for i in order[start : start + batch_prompts] for _ in range(n_samples)]
                texts = [prompt_text(prompts[i].prompt, empty_trace=mode == "nothinking") for i in rows]
                for i, ids in zip(rows, _generate(model, tokenizer, texts, temperature).tolist(), strict=True):
                    finished = tokenizer.eos_token_id in ids
                    ids = ids[: ids.index(tokenizer.eos_token_id)] if finished else ids
                    closed = ids.index(close) if close in ids else None
                    begin = 0 if mode == "nothinking" else len(ids) if closed is None else closed + 1
                    value = parse_answer(str(tokenizer.decode(ids[begin:]))) if finished else None
                    trace = 0 if mode == "nothinking" else len(ids) if closed is None else closed
                    yield Draw(i, mode, value, trace, finished)


def summarise(draws: list[Draw], prompts: list[Prompt]) -> Measures:
    """The measures of a set of draws; every prompt counts alike."""
    n = len(prompts)
    correct: dict[Mode, list[list[bool]]] = {mode: [[] for _ in prompts] for mode in MODES}
    values: list[set[int | None]] = [set() for _ in prompts]
    for draw in draws:
        correct[draw.mode][draw.prompt].append(draw.value is not None and str(draw.value) == prompts[draw.prompt].gold)
        # A response without an answer is no answer value of its own.
        if draw.mode == "thinking" and draw.value is not None:
            values[draw.prompt].add(draw.value)
    thinking, nothinking = (np.array([np.mean(row) for row in correct[mode]]) for mode in MODES)
    distinct = np.array([len(found) > 1 for found in values], dtype=np.float64)
    lengths = [draw.trace_tokens for draw in draws if draw.mode == "thinking"]
    p5, p95 = np.percentile(lengths, [5, 95])

    def error(per_prompt: np.ndarray) -> float:
        return float(per_prompt.std(ddof=1) / np.sqrt(n))

    return Measures(
        thinking_accuracy=float(thinking.mean()),
        thinking_error=error(thinking),
        nothinking_accuracy=float(nothinking.mean()),
        nothinking_error=error(nothinking),
        gap=float((thinking - nothinking).mean()),
        gap_error=error(thinking - nothinking),
        trace_p5=float(p5),
        trace_p95=float(p95),
        trace_spread=float(p95 / max(p5, 1.0)),
        distinct_share=float(distinct.mean()),
        distinct_error=error(distinct),
        unfinished_share=float(np.mean([not draw.finished for draw in draws])),
        n_prompts=n,
        n_samples=len(correct["thinking"][0]),
    )


def evaluate_folder(
    folder: Path,
    *,
    limit: int | None = None,
    n_samples: int = 5,
    temperature: float = 0.8,
    seed: int = 0,
) -> Measures:
    """Measures a model folder on the default held-out prompts.

    Args:
        folder: What ``bvpo-stats tiny train`` wrote.
        limit: Only the first ``limit`` prompts (at least 2: the errors are between prompts).
        n_samples: Responses per prompt and mode.
        temperature: Sampling temperature.
        seed: Seed of the draws.

    Raises:
        UserError: The folder holds no such model, or an option is out of range.
    """
    if n_samples < 2 or not 0 < temperature < float("inf") or (limit is not None and limit < 2):
        raise UserError("`samples` and `limit` must be at least 2 and `temperature` above 0.")
    if seed < 0:
        raise UserError(f"`seed={seed}`: must be at least 0.")
    try:
        # local_files_only: a mistyped folder must not be looked up on the hub.
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the files of a folder provoke
        raise UserError(f"no embedded model in {folder}; write one with `bvpo-stats tiny train`.") from error
    if tokenizer.convert_tokens_to_ids(THINK_CLOSE) in (None, tokenizer.unk_token_id):
        raise UserError(f"the tokenizer in {folder} has no {THINK_CLOSE} token; name a model of `tiny train`.")
    prompts = embedded_prompts(limit)
    draws = draw_responses(model, tokenizer, prompts, n_samples=n_samples, temperature=temperature, seed=seed)
    return summarise(list(draws), prompts)


def _rows(measures: Measures) -> list[tuple[str, str, str, bool]]:
    m = measures
    return [
        (
            "Thinking accuracy",
            f"{m.thinking_accuracy:.1%} ± {m.thinking_error:.1%}",
            "70% to 95%",
            0.70 <= m.thinking_accuracy <= 0.95,
        ),
        (
            "NoThinking accuracy",
            f"{m.nothinking_accuracy:.1%} ± {m.nothinking_error:.1%}",
            "above 20%",
            m.nothinking_accuracy > 0.20,
        ),
        ("Thinking minus NoThinking", f"{m.gap:.1%} ± {m.gap_error:.1%}", "15 points or more", m.gap >= 0.15),
        (
            "Trace tokens, p95 / p5",
            f"{m.trace_p95:.0f} / {m.trace_p5:.0f} = {m.trace_spread:.1f}",
            "3 or more",
            m.trace_spread >= 3,
        ),
        (
            "Prompts with more than one value",
            f"{m.distinct_share:.1%} ± {m.distinct_error:.1%}",
            "40% or more",
            m.distinct_share >= 0.40,
        ),
        ("Responses cut at the token limit", f"{m.unfinished_share:.2%}", "", True),
    ]


def render(measures: Measures) -> str:
    """The measures beside their bounds, as a Markdown table; ± is one standard error between prompts."""
    lines = [
        f"{measures.n_prompts} held-out prompts, {measures.n_samples} samples per prompt and mode",
        "",
        "| measure | measured | bound | met |",
        "| --- | --- | --- | --- |",
    ]
    for name, value, bound, met in _rows(measures):
        lines.append(f"| {name} | {value} | {bound} | {('yes' if met else 'no') if bound else ''} |")
    return "\n".join(lines)
