"""Sampling runs: which responses are missing, in which batches they are drawn, and how they are put on record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bvpo_stats.data.engines.base import Draw, Engine, Request, SamplingOptions
from bvpo_stats.data.jsonl import append_jsonl, read_jsonl
from bvpo_stats.data.records import Completion, Mode, Prompt, from_dict, to_dict
from bvpo_stats.model.templates import Template
from bvpo_stats.progress import progress

SAMPLES_FILE = "samples.jsonl"
_WINDOW = 256  # prompts planned at a time: bounds memory, and lets prompts of like length share a batch


@dataclass(frozen=True)
class SamplingRun:
    """Everything a sampling run needs besides its prompts.

    Attributes:
        engine: Who draws.
        template: Protocol and tokenizer.
        options: How to draw.
        model: Identity of the model, for the records.
        batch_size: Responses drawn at once.
        modes: Which of Thinking and NoThinking.
    """

    engine: Engine
    template: Template
    options: SamplingOptions
    model: str
    batch_size: int
    modes: tuple[Mode, ...]


def sample_into(path: Path, prompts: Iterable[Prompt], run: SamplingRun, *, n_prompts: int) -> None:
    """Draws every missing response and appends it to ``path``, a batch at a time.

    Batches are planned from all requests, finished ones included, and a batch with anything missing is drawn whole: a
    resumed run repeats the very computation of an uninterrupted one. Finished batches are skipped.

    Args:
        path: The JSONL file of completions; existing records count as finished.
        prompts: The prompts, in a reproducible order; streamed.
        run: Engine, template, options.
        n_prompts: How many prompts there are, for the progress display.
    """
    finished = finished_keys(path)
    total = n_prompts * len(run.modes) * run.options.samples
    with progress("Sampling", total, "responses", done=len(finished)) as advance:
        for batch in plan_batches(prompts, run):
            missing = [request.key for request in batch if request.key not in finished]
            if not missing:
                continue
            draws = run.engine.generate(batch, run.options)
            wanted = set(missing)
            rows = [
                to_dict(completion_record(request, draw, run))
                for request, draw in zip(batch, draws, strict=True)
                if draw is not None and request.key in wanted
            ]
            append_jsonl(path, rows)
            advance(len(rows))


def plan_batches(prompts: Iterable[Prompt], run: SamplingRun) -> Iterator[list[Request]]:
    """Cuts the requests into batches of one mode and similar prompt length, window by window; deterministic."""
    stream = iter(prompts)
    while window := list(islice(stream, _WINDOW)):
        for mode in run.modes:
            requests = [request for prompt in window for request in _requests(prompt, mode, run)]
            requests.sort(key=lambda request: len(request.prompt_ids))  # stable: samples of a prompt stay together
            for start in range(0, len(requests), run.batch_size):
                yield requests[start : start + run.batch_size]


def _requests(prompt: Prompt, mode: Mode, run: SamplingRun) -> list[Request]:
    ids = run.template.prompt_ids(prompt.prompt, mode)
    text = run.template.prompt_text(prompt.prompt, mode)
    return [Request(prompt, mode, index, ids, text) for index in range(run.options.samples)]


def completion_record(request: Request, draw: Draw, run: SamplingRun) -> Completion:
    """The record of one draw, trace and answer split."""
    answer_start, trace, answer = run.template.split(draw.completion_ids, request.mode)
    return Completion(
        prompt_id=request.prompt.prompt_id,
        sample_index=request.sample_index,
        mode=request.mode,
        prompt=request.prompt.prompt,
        prompt_ids=request.prompt_ids,
        completion_ids=draw.completion_ids,
        text=run.template.completion_text(draw.completion_ids),
        finish_reason=draw.finish_reason,
        answer_start=answer_start,
        trace=trace,
        answer=answer,
        seed=run.options.seed,
        temperature=run.options.temperature,
        top_p=run.options.top_p,
        max_new_tokens=run.options.max_new_tokens,
        model=run.model,
        template=run.template.name,
        engine=run.engine.name,
        gold=request.prompt.gold,
    )


def finished_keys(path: Path) -> set[str]:
    """Keys of the completions already on record."""
    if not path.exists():
        return set()
    return {f"{row['prompt_id']}/{row['mode']}/{row['sample_index']}" for _, row in read_jsonl(path)}


def read_completions(path: Path) -> Iterator[Completion]:
    """Streams the completions of a JSONL file.

    Raises:
        UserError: A line that is not a completion record; the line is named.
    """
    for number, row in read_jsonl(path):
        yield from_dict(Completion, row, f"{path}:{number}")


def automatic_batch_size(requested: int | None, longest: int, on_accelerator: bool) -> int:
    """Responses per batch: what was asked for, else about 64k tokens on an accelerator and 16k on a CPU, 1 to 256 rows."""
    if requested is not None:
        return requested
    budget = 65_536 if on_accelerator else 16_384
    return max(1, min(256, budget // max(1, longest)))


def check_one_source(completions: Sequence[Completion]) -> None:
    """Raises UserError when records of several models or templates are mixed."""
    from bvpo_stats.errors import UserError

    for field in ("model", "template"):
        names = sorted({getattr(completion, field) for completion in completions})
        if len(names) > 1:
            raise UserError(f"Samples of several {field}s are mixed: {', '.join(names)}. Analyse them one at a time.")
