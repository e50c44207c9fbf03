"""Sampling runs: which responses are missing, in which batches they are drawn, and how they are put on record."""

from __future__ import annotations

import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bvpo_stats import options
from bvpo_stats.errors import UserError, check_kind, check_whole
from bvpo_stats.model.templates import PromptError, Template
from bvpo_stats.progress import progress, say, spoken_bytes
from bvpo_stats.records import (
    MODES,
    Completion,
    Mode,
    Prompt,
    Question,
    Truncation,
    content_of,
    draw_key,
    question_turns,
    to_dict,
)
from bvpo_stats.sampling.engines.base import Draw, Engine, Outcome, Request, SamplingOptions, SetAside
from bvpo_stats.sampling.prompts import load_prompts
from bvpo_stats.store.jsonl import KeySet, append_jsonl, mend, read_jsonl
from bvpo_stats.store.run_folder import WHOLE, Shard, run_files
from bvpo_stats.store.tables import Source

if TYPE_CHECKING:
    from bvpo_stats.model.policy import Policy

SAMPLES_FILE = "samples.jsonl"
SET_ASIDE_FILE = "set_aside.jsonl"
_BYTES_PER_TOKEN = 12  # of samples.jsonl: a number, and the token's text twice
_WINDOW_ROWS = 160  # responses planned at a time: bounds memory, and lets prompts of like length share a batch


class Samples(list[Completion]):
    """What `sample` returns: a list of completions that knows the template it was drawn with.

    Attributes:
        template: Protocol and tokenizer.
        set_aside: By prompt id: why it could not be put to the model.
    """

    def __init__(
        self, completions: Iterable[Completion], template: Template, set_aside: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(completions)
        self.template = template
        self.set_aside = dict(set_aside or {})


def sample(
    policy: Policy | str,
    prompts: Source,
    n: int = 5,
    *,
    temperature: float = 1.0,
    modes: Sequence[Mode] = MODES,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
    seed: int = 0,
    batch_size: int | Literal["auto"] = "auto",
) -> Samples:
    """Draws responses with a policy, in memory: what ``bvpo-stats sample`` puts on record, response by response.

    At the defaults, temperature 1 without a nucleus, pairs made of them have b_t = 0 at the reference point.

    Args:
        policy: The policy; a name or folder is loaded by `load_policy`.
        prompts: Questions as text or messages, `Prompt` records, rows or a dataset; or a source as `load_prompts` takes
            it, e.g. ``embedded`` or a file.
        n: Responses per prompt and mode.
        temperature: Softmax temperature.
        modes: Which of ``thinking`` (D_t) and ``nothinking`` (D_e).
        top_p: Nucleus mass; 1 for the whole distribution.
        max_new_tokens: Cut-off; None for 256 with the embedded model, else 4096.
        seed: Decides every draw, together with prompt, mode and number.
        batch_size: Most responses drawn at once.

    Returns:
        Completions by prompt (in the order given), mode and number. A prompt that cannot be put to the model (too long,
        control tokens in its text, a turn that the template leaves out) is set aside with a warning.

    Raises:
        UserError: A setting out of its range, no prompts, none that can be used, or NaN logits.
    """
    from bvpo_stats.model.policy import as_policy

    policy = as_policy(policy)
    check_whole("n", n)
    check_modes(modes)
    questions = list(load_prompts(prompts))
    max_new_tokens = options.max_new_tokens(max_new_tokens, policy.identity.partition("@")[0])
    drawing = SamplingOptions(n, temperature, top_p, max_new_tokens, seed)
    size = None if batch_size == "auto" else batch_size
    run = local_run(policy, drawing, modes, [prompt.question for prompt in questions], size)
    unusable: list[tuple[Prompt, SetAside]] = []
    nothing = KeySet(())
    found: list[Completion] = []
    with progress("Sampling", len(questions) * len(modes) * n, "responses") as advance:
        for group in run.engine.draw(plan_batches(questions, run, unusable=unusable), drawing):
            drawn, _ = _records(group, run, nothing)
            found += drawn
            advance(len(drawn))
    _check_some_usable(unusable, len(questions))
    for _, outcome in unusable:
        warnings.warn(f"Set aside: {outcome.detail}", stacklevel=2)
    order = {prompt.prompt_id: place for place, prompt in enumerate(questions)}
    found.sort(key=lambda c: (order[c.prompt_id], MODES.index(c.mode), c.sample_index))
    return Samples(found, policy.template, {prompt.prompt_id: outcome.detail for prompt, outcome in unusable})


def local_run(
    policy: Policy,
    options: SamplingOptions,
    modes: Sequence[Mode],
    questions: Iterable[Question],
    batch_size: int | None,
) -> SamplingRun:
    """A run that draws with a policy in memory.

    Args:
        policy: The policy.
        options: How to draw.
        modes: Which of Thinking and NoThinking.
        questions: Those among which the longest is.
        batch_size: Most responses drawn at once; None for what :func:`automatic_batch_size` gives.
    """
    from bvpo_stats.sampling.engines.transformers_engine import TransformersEngine, sampler_identity

    positions = policy.max_positions
    run = SamplingRun(
        TransformersEngine(policy),
        policy.template,
        options,
        sampler_identity(policy),
        batch_size=1,
        modes=tuple(modes),
        longest_prompt=None if positions is None else positions - 1,
    )
    longest = longest_prompt(policy.template, questions, modes, positions)
    rows = automatic_batch_size(batch_size, longest + options.max_new_tokens, policy.device.type != "cpu")
    return replace(run, batch_size=rows)


def longest_prompt(
    template: Template, questions: Iterable[Question], modes: Sequence[Mode], positions: int | None = None
) -> int:
    """Tokens of the longest prompt among some questions; those that cannot be put to the model do not count."""
    most = None if positions is None else positions - 1
    prompts = (Prompt("", "", messages=question_turns(question)) for question in questions)
    drafts = (_drafts(prompt, template, modes, most) for prompt in prompts)
    found = (draft for draft in drafts if not isinstance(draft, SetAside))
    return max((len(ids) for draft in found for ids, _ in draft.values()), default=1)


def check_modes(modes: Sequence[Mode]) -> None:
    """Raises UserError where modes are none, unknown, or named twice."""
    named = list(modes) if isinstance(modes, Sequence) and not isinstance(modes, str) else []
    if not named or any(mode not in MODES for mode in named) or any(named.count(mode) > 1 for mode in named):
        raise UserError(f"`modes={modes!r}`: give one or both of {', '.join(MODES)}, each once.")


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
        longest_prompt: Most tokens of a prompt; None where that is for the engine to say.
    """

    engine: Engine
    template: Template
    options: SamplingOptions
    model: str
    batch_size: int
    modes: tuple[Mode, ...]
    longest_prompt: int | None = None


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
    Whatever any process of the run has on record (``samples*.jsonl``, ``set_aside*.jsonl``) counts as finished. A
    prompt that cannot be put to the model is set aside with all its requests, and the run goes on.

    Args:
        folder: Folder of the run.
        prompts: The prompts, in a reproducible order; streamed.
        run: Engine, template, options.
        n_prompts: How many prompts there are, for the progress display.
        shard: Which part of the run to do.

    Raises:
        UserError: Records of another model or template are mixed in, no prompt can be used, or the engine cannot go on.
            What was drawn is kept.
    """
    samples, aside = shard.file(folder, SAMPLES_FILE), shard.file(folder, SET_ASIDE_FILE)
    mine = [samples, aside]
    if shard.whole:  # nobody else is writing
        mine = [path for name in (SAMPLES_FILE, SET_ASIDE_FILE) for path in run_files(folder, name)]
    for path in mine:
        mend(path)
    finished = finished_keys(folder, model=run.model, template=run.template.name)
    own = finished if shard.whole else KeySet(_keys(path for path in (samples, aside) if path.exists()))
    total = shard.share(n_prompts, window_size(run.options)) * len(run.modes) * run.options.samples
    responses = tokens = put_aside = 0
    missing = total - len(own)
    if missing > 0:
        most = missing * run.options.max_new_tokens
        say(
            f"Sampling: {missing:,} responses of at most {run.options.max_new_tokens:,} tokens ({most:,} in all), "
            f"at most about {spoken_bytes(_BYTES_PER_TOKEN * most)} on disk in {folder} "
            f"({spoken_bytes(shutil.disk_usage(folder).free)} free)."
        )
    started = time.monotonic()
    unusable: list[tuple[Prompt, SetAside]] = []
    first: Truncation | None = Truncation()
    with progress("Sampling", total, "responses", done=len(own)) as advance:
        for group in run.engine.draw(_unfinished(prompts, run, finished, shard, unusable), run.options):
            drawn, lost = _records(group, run, finished)
            append_jsonl(samples, map(to_dict, drawn))
            append_jsonl(aside, (outcome.as_row(r.prompt.prompt_id, r.mode, r.sample_index) for r, outcome in lost))
            responses += len(drawn)
            tokens += sum(len(completion.completion_ids) for completion in drawn)
            put_aside += len(lost)
            advance(len(drawn) + len(lost))
            first = _look(first, drawn, run.options)
        _check_some_usable(unusable, n_prompts)
        if shard.index == 1:  # every shard meets them all
            rows = [row for prompt, outcome in unusable for row in _unusable_rows(prompt, outcome, run)]
            rows = [row for row in rows if _key(row) not in finished]
            append_jsonl(aside, rows)
            put_aside += len(rows)
            advance(len(rows))
    return SamplingTally(responses, tokens, put_aside, time.monotonic() - started)


_LOOK = 8
"""Thinking responses among which one should have closed its trace."""


def _look(first: Truncation | None, drawn: Iterable[Completion], options: SamplingOptions) -> Truncation | None:
    """Counts a run's first responses with a trace, and says at once where none of them has closed it.

    What a model does at all, a run of hours should not be needed to find out.

    Args:
        first: The count so far; None once one has closed its trace, or it has been said.
        drawn: Further responses.
        options: How they were drawn.
    """
    for completion in drawn:
        if first is not None and completion.mode == "thinking":
            closed = completion.answer_start is not None
            first = None if closed else first.count(completion.finish_reason, completion.answer_start)
    if first is None or first.responses < _LOOK:
        return first
    if first.cut >= first.unclosed:
        advice = (
            f"{first.cut} were cut at {options.max_new_tokens:,} tokens. Stop, and raise `max_new_tokens`; if traces "
            "still do not close, check `template`, and that the model was trained to close them."
        )
    else:
        advice = (
            f"{first.unclosed} ended by themselves, so more tokens do not help. Stop, and check `model` and "
            "`template`: it must be a reasoning model, trained to close its trace."
        )
    say(f"None of the first {first.responses} thinking responses closes its trace: {advice}")
    return None


def _records(
    group: Iterable[tuple[Request, Outcome]], run: SamplingRun, finished: KeySet
) -> tuple[list[Completion], list[tuple[Request, SetAside]]]:
    """What an engine has just finished: records of the draws that were missing, and what was set aside."""
    missing = [(request, outcome) for request, outcome in group if request.key not in finished]
    drawn = [completion_record(request, outcome, run) for request, outcome in missing if isinstance(outcome, Draw)]
    return drawn, [(request, outcome) for request, outcome in missing if isinstance(outcome, SetAside)]


Drafts = dict[Mode, tuple[tuple[int, ...], str]]
"""A prompt as the engine gets it, in every mode of a run: token ids and text."""


def _drafts(prompt: Prompt, template: Template, modes: Sequence[Mode], most: int | None) -> Drafts | SetAside:
    """A prompt in each of some modes, or why it cannot be put to a model that takes at most so many of its tokens."""
    try:
        texts = {mode: template.prompt_text(prompt.question, mode) for mode in modes}
    except PromptError as error:
        return SetAside(error.reason, f"Prompt {prompt.prompt_id}: {error}")
    drafts: Drafts = {mode: (template.encode(text), text) for mode, text in texts.items()}
    longest = max(len(ids) for ids, _ in drafts.values())
    if most is not None and longest > most:
        detail = f"Prompt {prompt.prompt_id}: {longest} tokens leave no room in the model's {most + 1} positions."
        return SetAside("prompt-too-long", detail)
    return drafts


def _check_some_usable(unusable: Sequence[tuple[Prompt, SetAside]], n_prompts: int) -> None:
    if unusable and len(unusable) == n_prompts:
        raise UserError(f"None of the {n_prompts} prompts can be used. {unusable[0][1].detail}")


def _unusable_rows(prompt: Prompt, outcome: SetAside, run: SamplingRun) -> Iterator[dict[str, Any]]:
    for mode in run.modes:
        for index in range(run.options.samples):
            yield outcome.as_row(prompt.prompt_id, mode, index)


def _key(row: Mapping[str, Any]) -> str:
    return draw_key(row["prompt_id"], row["mode"], row["sample_index"])


def _unfinished(
    prompts: Iterable[Prompt],
    run: SamplingRun,
    finished: KeySet,
    shard: Shard,
    unusable: list[tuple[Prompt, SetAside]],
) -> Iterator[list[Request]]:
    for batch in plan_batches(prompts, run, shard, unusable):
        missing = [request for request in batch if request.key not in finished]
        if missing:
            yield batch if run.engine.whole_batches else missing


def window_size(options: SamplingOptions) -> int:
    """Prompts that are planned together: the unit in which shards are dealt out."""
    return max(1, _WINDOW_ROWS // options.samples)


def plan_batches(
    prompts: Iterable[Prompt],
    run: SamplingRun,
    shard: Shard = WHOLE,
    unusable: list[tuple[Prompt, SetAside]] | None = None,
) -> Iterator[list[Request]]:
    """Cuts the requests into batches of one mode and similar prompt length, window by window; deterministic.

    Batches stay inside a window and are of equal size there, up to one response.

    Args:
        prompts: Streamed.
        run: Engine, template, options.
        shard: Which windows to plan.
        unusable: Collects the prompts that cannot be put to the model; every shard meets all of them.
    """

    def usable() -> Iterator[tuple[Prompt, Drafts]]:
        for prompt in prompts:
            drafts = _drafts(prompt, run.template, run.modes, run.longest_prompt)
            if not isinstance(drafts, SetAside):
                yield prompt, drafts
            elif unusable is not None:
                unusable.append((prompt, drafts))

    stream = usable()
    number = 0
    while window := list(islice(stream, window_size(run.options))):
        if shard.owns(number):
            for mode in run.modes:
                requests = [request for entry in window for request in _requests(*entry, mode, run)]
                requests.sort(key=lambda request: len(request.prompt_ids))  # stable: samples of a prompt stay together
                yield from _even_parts(requests, -(-len(requests) // run.batch_size))
        number += 1


def _even_parts(requests: list[Request], parts: int) -> Iterator[list[Request]]:
    for part in range(parts):
        yield requests[part * len(requests) // parts : (part + 1) * len(requests) // parts]


def _requests(prompt: Prompt, drafts: Drafts, mode: Mode, run: SamplingRun) -> list[Request]:
    ids, text = drafts[mode]
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
        top_k=run.engine.top_k,
        max_new_tokens=run.options.max_new_tokens,
        model=run.model,
        template=run.template.name,
        engine=run.engine.name,
        gold=request.prompt.gold,
        messages=request.prompt.messages,
        sampler_logp=draw.sampler_logp,
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
                if content_of(row.get(field)) != content_of(value):
                    raise UserError(
                        f"{path}:{number}: a record of {field} {row.get(field)!r} among those of {value!r}. "
                        "Remove it, or name a new `output` folder."
                    )
            yield _key(row)


def automatic_batch_size(requested: int | None, longest: int, on_accelerator: bool) -> int:
    """Responses per batch: what was asked for, else 1 to 256 for about 64k tokens (accelerator) or 16k (CPU)."""
    if requested is not None:
        check_whole("batch_size", requested)
        return requested
    budget = 65_536 if on_accelerator else 16_384
    return max(1, min(256, budget // max(1, longest)))


def check_one_source(completions: Sequence[Completion]) -> None:
    """Raises UserError when records of several models or templates are mixed."""
    for number, completion in enumerate(completions, start=1):
        check_kind(f"samples, row {number}", completion, Completion, "a Completion")
    for field in ("model", "template"):
        names = sorted({getattr(completion, field) for completion in completions})
        if len({content_of(name) for name in names}) > 1:
            raise UserError(f"Samples of several {field}s are mixed: {', '.join(names)}. Analyse them one at a time.")


@dataclass(frozen=True)
class ModeSummary:
    """Completions of one mode.

    Attributes:
        responses: How many.
        tokens: Their tokens in all.
        truncated: Cut at the length limit.
        unclosed: Ended by themselves without closing their trace.
        empty_answers: Finished responses whose answer is empty.
        mean_tokens: Mean length, end-of-sequence included, of all of them.
        mean_trace_tokens: Mean number of trace tokens among those that have an answer, None in NoThinking mode.
        mean_answer_tokens: Mean number of answer tokens among those that have an answer.
    """

    responses: int
    tokens: int
    truncated: int
    unclosed: int
    empty_answers: int
    mean_tokens: float | None
    mean_trace_tokens: float | None
    mean_answer_tokens: float | None

    @property
    def truncation(self) -> Truncation:
        """The responses without an answer."""
        return Truncation(self.responses, self.truncated, self.unclosed)


def summarise(completions: Iterable[Completion]) -> dict[Mode, ModeSummary]:
    """Summaries by mode, for the modes that occur.

    Args:
        completions: Streamed.
    """
    counts: dict[Mode, Counter[str]] = {}
    for completion in completions:
        count = counts.setdefault(completion.mode, Counter())
        length, start = len(completion.completion_ids), completion.answer_start
        count["responses"] += 1
        count["tokens"] += length
        count["truncated"] += completion.finish_reason == "length"
        if start is None:
            count["unclosed"] += completion.finish_reason == "stop"
        else:
            count["answers"] += 1
            count["trace"] += start
            count["answer"] += length - start
            count["empty"] += completion.finish_reason == "stop" and not completion.answer
    return {mode: _finish(mode, counts[mode]) for mode in sorted(counts, reverse=True)}


def _finish(mode: Mode, count: Counter[str]) -> ModeSummary:
    answers = count["answers"]
    return ModeSummary(
        responses=count["responses"],
        tokens=count["tokens"],
        truncated=count["truncated"],
        unclosed=count["unclosed"],
        empty_answers=count["empty"],
        mean_tokens=count["tokens"] / count["responses"],
        mean_trace_tokens=count["trace"] / answers if answers and mode == "thinking" else None,
        mean_answer_tokens=count["answer"] / answers if answers else None,
    )


def first_set_aside(paths: Iterable[Path]) -> dict[str, str]:
    """What happened to the first request set aside for each reason."""
    found: dict[str, str] = {}
    for path in paths:
        for _, row in read_jsonl(path, growing=True):
            found.setdefault(str(row["reason"]), str(row["detail"]))
    return found


def count_set_aside(paths: Iterable[Path]) -> dict[str, int]:
    """How many requests were set aside, by reason."""
    return dict(Counter(str(row["reason"]) for path in paths for _, row in read_jsonl(path, growing=True)))
