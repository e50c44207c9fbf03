"""Synthetic samples of the embedded task, made without a model: exact ids, texts and boundaries by the template."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from bvpo_stats.embedded.tokenizer import build_tokenizer
from bvpo_stats.model.templates import Template, find_template
from bvpo_stats.records import Completion, Mode, to_dict


@functools.cache
def template() -> Template:
    return find_template(build_tokenizer())


def sample(
    prompt_id: str,
    index: int,
    answer: str,
    *,
    mode: Mode = "thinking",
    trace: str = "8+9=17",
    question: str = "What is 8+9?",
    gold: str | None = "17",
    **changes: object,
) -> Completion:
    """A complete response, as a sampling run would have recorded it."""
    tokenizer = template().tokenizer
    text = f"{trace}</think>{answer}" if mode == "thinking" else answer
    ids = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
    start, trace_text, answer_text = template().split(ids, mode)
    record = Completion(
        prompt_id=prompt_id,
        sample_index=index,
        mode=mode,
        prompt=question,
        prompt_ids=template().prompt_ids(question, mode),
        completion_ids=ids,
        text=text,
        finish_reason="stop",
        answer_start=start,
        trace=trace_text,
        answer=answer_text,
        seed=0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=64,
        model="embedded@test",
        template="embedded",
        engine="file",
        gold=gold,
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def truncated(prompt_id: str, index: int, mode: Mode = "thinking") -> Completion:
    """A response that was cut inside its trace (thinking) or its answer (nothinking)."""
    whole = sample(prompt_id, index, "17", mode=mode)
    ids = whole.completion_ids[:1]
    start, trace, answer = template().split(ids, mode)
    return replace(whole, completion_ids=ids, finish_reason="length", answer_start=start, trace=trace, answer=answer)


def unclosed(prompt_id: str, index: int) -> Completion:
    """A response that ended by itself without closing its trace."""
    whole = sample(prompt_id, index, "17")
    ids = (*whole.completion_ids[:2], whole.completion_ids[-1])
    start, trace, answer = template().split(ids, "thinking")
    return replace(whole, completion_ids=ids, answer_start=start, trace=trace, answer=answer)


def both_modes(prompt_id: str, answers: Sequence[str], **changes: object) -> list[Completion]:
    """The same answers in both modes."""
    return [
        sample(prompt_id, index, answer, mode=mode, **changes)  # type: ignore[arg-type]
        for mode in ("thinking", "nothinking")
        for index, answer in enumerate(answers)
    ]


def write_samples(folder: Path, samples: Iterable[Completion], name: str = "samples.jsonl") -> Path:
    """Writes a samples folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(to_dict(completion), ensure_ascii=False) + "\n" for completion in samples)
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder
