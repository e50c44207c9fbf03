"""Sampling runs: which responses are missing, in which batches they are drawn, and how they are put on record."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from bvpo_stats.errors import UserError
from bvpo_stats.model.templates import Template
from bvpo_stats.progress import progress
from bvpo_stats.records import Completion, Mode, Prompt, to_dict
from bvpo_stats.sampling.engines.base import Draw, Engine, Request, SamplingOptions, SetAside
from bvpo_stats.store.jsonl import append_jsonl, read_jsonl
from bvpo_stats.store.key_set import KeySet
from bvpo_stats.store.shards import WHOLE, Shard, run_files

SAMPLES_FILE = "samples.jsonl"
SET_ASIDE_FILE = "set_aside.jsonl"
_WINDOW_ROWS = 160  # responses planned at a time: bounds memory, and lets prompts of like length share a batch


@dataclass(frozen=True)
class SamplingRun:
    """Everything a sampling run needs besides its prompts.

    Attributes:
        engine: Who draws.
        template: Protocol and tokenizer.
        options: How to draw.
        model: Identity of the model, for the records.
        batch_size: Most responses drawn at once.
        modes: Which of Thinking and NoThinking.
    """

    engine: Engine
    template: Template
    options: SamplingOptions
    model: str
    batch_size: int
    modes: tuple[Mode, ...]


@dataclass(frozen=True)
class SamplingTally:
    """What one call of :func:`sample_into` did.

    Attributes:
        responses: Responses put on record.
        tokens: Their tokens.
        set_aside: Requests set aside.
        seconds: Time taken.
    """

    responses: int
    tokens: int
    set_aside: int
    seconds: float


def sample_into(
    folder: Path, prompts: Iterable[Prompt], run: SamplingRun, *, n_prompts: int, shard: Shard = WHOLE
) -> SamplingTally:
    """Draws every missing response of a shard and appends it to the shard's ``samples.jsonl``.

    Batches are planned from all requests, finished ones included, and an engine whose rounding depends on the batch
    draws a batch with anything missing whole: a resumed run repeats the very computation of an uninterrupted one.
    Whatever any process of the run has on record (``samples*.jsonl``, ``set_aside*.jsonl``) counts as finished.

    Args:
        folder: Folder of the run.
        prompts: The prompts, in a reproducible order; streamed.
        run: Engine, template, options.
        n_prompts: How many prompts there are, for the progress display.
        shard: Which part of the run to do.

    Raises:
        UserError: Records of another model or template are mixed in, or the engine cannot go on. What was drawn is
            kept.
    """
    samples, aside = shard.file(folder, SAMPLES_FILE), shard.file(folder, SET_ASIDE_FILE)
    finished = finished_keys(folder, model=run.model, template=run.template.name)
    own = finished if shard.whole else KeySet(_keys(path for path in (samples, aside) if path.exists()))
    total = shard.share(n_prompts, window_size(run.options)) * len(run.modes) * run.options.samples
    responses = tokens = put_aside = 0
    started = time.monotonic()
    with progress("Sampling", total, "responses", done=len(own)) as advance:
        for group in run.engine.draw(_unfinished(prompts, run, finished, shard), run.options):
            missing = [(request, outcome) for request, outcome in group if request.key not in finished]
            drawn = [(request, outcome) for request, outcome in missing if isinstance(outcome, Draw)]
            append_jsonl(samples, (to_dict(completion_record(request, draw, run)) for request, draw in drawn))
            lost = [(request, outcome) for request, outcome in missing if isinstance(outcome, SetAside)]
            append_jsonl(aside, (_identify(request) | asdict(outcome) for request, outcome in lost))
            responses += len(drawn)
            tokens += sum(len(draw.completion_ids) for _, draw in drawn)
            put_aside += len(lost)
            advance(len(missing))
    return SamplingTally(responses, tokens, put_aside, time.monotonic() - started)


def _identify(request: Request) -> dict[str, str | int]:
    return {"prompt_id": request.prompt.prompt_id, "mode": request.mode, "sample_index": request.sample_index}


def _unfinished(prompts: Iterable[Prompt], run: SamplingRun, finished: KeySet, shard: Shard) -> Iterator[list[Request]]:
    for batch in plan_batches(prompts, run, shard):
        missing = [request for request in batch if request.key not in finished]
        if missing:
            yield batch if run.engine.whole_batches else missing


def window_size(options: SamplingOptions) -> int:
    """Prompts that are planned together: the unit in which shards are dealt out."""
    return max(1, _WINDOW_ROWS // options.samples)


def plan_batches(prompts: Iterable[Prompt], run: SamplingRun, shard: Shard = WHOLE) -> Iterator[list[Request]]:
    """Cuts the requests into batches of one mode and similar prompt length, window by window; deterministic.

    Batches stay inside a window and are of equal size there, up to one response.
    """
    stream = iter(prompts)
    number = 0
    while window := list(islice(stream, window_size(run.options))):
        if shard.owns(number):
            for mode in run.modes:
                requests = [request for prompt in window for request in _requests(prompt, mode, run)]
                requests.sort(key=lambda request: len(request.prompt_ids))  # stable: samples of a prompt stay together
                yield from _even_parts(requests, -(-len(requests) // run.batch_size))
        number += 1


def _even_parts(requests: list[Request], parts: int) -> Iterator[list[Request]]:
    for part in range(parts):
        yield requests[part * len(requests) // parts : (part + 1) * len(requests) // parts]


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


def finished_keys(folder: Path, *, model: str, template: str) -> KeySet:
    """Keys of every response on record in a run's folder, shards and set-aside requests included.

    Raises:
        UserError: A record of another model or template is among them; the line is named.
    """
    samples = _keys(run_files(folder, SAMPLES_FILE), model=model, template=template)
    return KeySet(key for keys in (samples, _keys(run_files(folder, SET_ASIDE_FILE))) for key in keys)


def _keys(paths: Iterable[Path], **expected: str) -> Iterator[str]:
    for path in paths:
        for number, row in read_jsonl(path, growing=True):
            for field, value in expected.items():
                if row.get(field) != value:
                    raise UserError(
                        f"{path}:{number}: a record of {field} {row.get(field)!r} among those of {value!r}. "
                        "Remove it, or name a new `output` folder."
                    )
            yield f"{row['prompt_id']}/{row['mode']}/{row['sample_index']}"


def automatic_batch_size(requested: int | None, longest: int, on_accelerator: bool) -> int:
    """Responses per batch: what was asked for, else 1 to 256 for about 64k tokens (accelerator) or 16k (CPU)."""
    if requested is not None:
        return requested
    budget = 65_536 if on_accelerator else 16_384
    return max(1, min(256, budget // max(1, longest)))


def check_one_source(completions: Sequence[Completion]) -> None:
    """Raises UserError when records of several models or templates are mixed."""
    for field in ("model", "template"):
        names = sorted({getattr(completion, field) for completion in completions})
        if len(names) > 1:
            raise UserError(f"Samples of several {field}s are mixed: {', '.join(names)}. Analyse them one at a time.")
