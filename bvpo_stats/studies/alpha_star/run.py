"""The alpha-star study: records into gradients into moments, resumed and merged over processes, and the report."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from bvpo_stats.distributed import World, joined_world
from bvpo_stats.errors import UserError, check_choice, check_kind, check_positive, check_whole
from bvpo_stats.gradients.curvature import CurvatureOptions, measure_curvature, noise_curvature
from bvpo_stats.gradients.engine import BlockLayout, RowRules
from bvpo_stats.gradients.examples import Example, Joined, join
from bvpo_stats.gradients.ladder import MarginalChoice, choose_marginal
from bvpo_stats.gradients.marginal import SideDiagnostics, WeightDiagnostics
from bvpo_stats.gradients.moments import DeviceMoments, MomentPlan, PassMoments
from bvpo_stats.gradients.objectives import LOSSES, Objective
from bvpo_stats.gradients.options import MarginalMethod, StreamOptions
from bvpo_stats.gradients.stream import GradientBatch, gradient_batches, project_sides, row_rules
from bvpo_stats.model.metric import UnreadableMetricError, read_second_moments
from bvpo_stats.model.needs import spared
from bvpo_stats.model.policy import (
    Policy,
    PolicyOptions,
    as_policy,
    load_policy,
    load_template,
    on_own_device,
    with_lora,
)
from bvpo_stats.model.subset import (
    LoraOptions,
    Probe,
    Subset,
    linear_subset,
    lora_subset,
    probe_subset,
    uncovered_share,
)
from bvpo_stats.model.templates import Template
from bvpo_stats.progress import progress, say, spoken_bytes
from bvpo_stats.records import MODES, MOST_LOST, Mode, PreferencePair, TraceRecord
from bvpo_stats.sampling.layouts import all_pairs, read_pairs
from bvpo_stats.sampling.scoring import SamplerRatio, sampler_ratio
from bvpo_stats.statistics.alpha import adam_metric
from bvpo_stats.statistics.bounds import DriftBound, drift_bound
from bvpo_stats.statistics.estimates import LinearRatio, noise_scale
from bvpo_stats.statistics.moments import MomentSummary, jackknife_groups
from bvpo_stats.store.jsonl import replacing, sha256_of, write_atomic
from bvpo_stats.store.run_folder import RUN_FILE, Shard, check_room, open_run
from bvpo_stats.store.tables import fingerprint, read_records
from bvpo_stats.studies.alpha_star.config import AlphaConfig, AlphaInputs
from bvpo_stats.studies.alpha_star.report import (
    AlphaReport,
    AlphaSettings,
    Marginal,
    OptimizerName,
    OptimizerStep,
    finite,
)

MOMENTS_FILE = "moments.npz"
SUMS_FILE = "moments.bin"
METRIC_FILE = "second_moments.npz"
SAMPLER_FILE = "sampler.json"
_SAVE_EVERY_SECONDS = 30.0
_MANY_COPIES = 0.5  # share of answers with copies of one trace only beyond which the report warns
_SAVE_SHARE = 20.0  # a save may take one part in so many of the time

Pairs: TypeAlias = str | Path | Iterable[Any]
"""Pairs in memory, in any layout of `bvpo_stats.sampling.layouts.as_pairs`, or where they lie."""


@dataclass(frozen=True)
class AlphaOptions:
    """How alpha* is estimated.

    Attributes:
        stream: Loss, marginal estimator, budgets.
        settings: Batch size, step size, level.
        groups: Jackknife groups; ``auto`` for the rule of `bvpo_stats.statistics.moments.jackknife_groups`.
        curvature: Measure eta L with this; None to take it from ``settings``.
        second_moments: Adam's second moments by parameter name, for alpha in Adam's metric; None for none.
        epsilon: Adam's epsilon.
        optimizer: Whose steps eta L is measured for; None for nobody's.
        learning_rate: Its eta.
        metric: Where ``second_moments`` come from, or why SGD's metric stands in, in words.
        measured_eta_l: Whether the whole report is at the optimizer's measured eta L.
    """

    stream: StreamOptions = field(default_factory=StreamOptions)
    settings: AlphaSettings = field(default_factory=AlphaSettings)
    groups: int | Literal["auto"] = "auto"
    curvature: CurvatureOptions | None = None
    second_moments: dict[str, NDArray[Any]] | None = None
    epsilon: float = 1e-8
    optimizer: OptimizerName | None = None
    learning_rate: float | None = None
    metric: str = ""
    measured_eta_l: bool = False

    def __post_init__(self) -> None:
        if self.optimizer is not None:
            check_choice("optimizer", self.optimizer, get_args(OptimizerName))
            if self.learning_rate is None:
                raise UserError(f"`optimizer={self.optimizer!r}` needs its eta to measure eta L: give `learning_rate`.")
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)


def run_alpha_star(config: AlphaConfig, output: Path) -> AlphaReport | None:
    """Runs (or resumes) an alpha-star study in a folder and writes its report and figures.

    The gradients are what takes time; batch size, step size and level only enter at the end. The same folder therefore
    answers for another batch size without touching the model again.

    Started by ``torchrun`` or ``accelerate launch``, each process takes its share of the prompts; the first one merges
    and writes.

    Returns:
        The report; None in all processes but the first.

    Raises:
        UserError: Anything wrong with the input; see the message.
    """
    with joined_world() as world:
        identity = fingerprints(config.inputs)
        joined = load_examples(config.inputs, config.policy)
        _check_groups(joined.prompts, config.groups)
        options = _options(config)
        if config.optimizer_state is not None and not config.optimizer_state.exists():
            raise UserError(f"`optimizer_state={str(config.optimizer_state)!r}`: no such file or folder.")
        policy = load_policy(on_own_device(config.policy, world.local_rank, world.size))
        lora = LoraOptions(r=config.lora_r, targets=config.target_modules, seed=config.seed)
        theta, probe = config.theta, Probe(config.probe_rank, config.seed)
        policy, subset, words = prepare_subset(policy, config.params, lora, theta=theta, probe=probe)
        if config.optimizer_state is not None:
            options = _with_state(options, config.optimizer_state, subset)
        identity |= _identity(config, lora, options, policy, words)
        with open_run(output, "alpha-star", identity, shard=Shard(world.rank + 1, world.size)) as folder:
            report = _estimate(policy, subset, joined, options, words, folder, world)
            if world.leads:
                report.write(folder)
        return report if world.leads else None


def _with_state(options: AlphaOptions, path: Path, subset: Subset) -> AlphaOptions:
    """With the metric of an optimizer's state; SGD's where the state has none to read and an optimizer was named."""
    try:
        moments, epsilon = read_second_moments(path, subset)
    except UnreadableMetricError as error:
        if options.optimizer is None:
            raise
        return replace(options, metric=f"that of SGD, for the state has none to read: {error}")
    return replace(
        options, second_moments=moments, epsilon=epsilon, metric="1 / (sqrt(v) + eps) of the optimizer's state"
    )


def _options(config: AlphaConfig) -> AlphaOptions:
    curvature = None
    if config.eta_l == "auto" and config.optimizer is None:
        assert config.learning_rate is not None  # or the configuration would not have been made
        curvature = CurvatureOptions(config.learning_rate, seed=config.seed)
    return AlphaOptions(
        stream=StreamOptions(
            objective=Objective(LOSSES[config.loss_type], config.beta, config.simpo_gamma),
            method=config.method,
            traces_per_answer=config.traces_per_answer,
            half_splits=True,
            allow_mismatch=config.allow_mismatch,
            seed=config.seed,
            max_tokens=config.max_tokens,
        ),
        settings=AlphaSettings(
            batch_size=config.batch_size,
            eta_l=1.0 if config.eta_l == "auto" else config.eta_l,
            level=config.level,
        ),
        groups=config.groups,
        curvature=curvature,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        measured_eta_l=config.eta_l == "auto",
    )


def alpha_star(
    policy: Policy,
    pairs: Pairs,
    empty_pairs: Pairs | None = None,
    *,
    traces: Sequence[TraceRecord] = (),
    batch_size: float = 128.0,
    eta_l: float = 1.0,
    level: float = 0.95,
    objective: Objective | None = None,
    marginal: MarginalMethod | None = None,
    groups: int | Literal["auto"] = "auto",
    lora: int | LoraOptions | None = None,
    theta: str = "lora",
    probe_rank: int = 8,
    subset: Subset | None = None,
    curvature: CurvatureOptions | None = None,
    optimizer: OptimizerName | None = None,
    learning_rate: float | None = None,
    second_moments: dict[str, NDArray[Any]] | None = None,
    epsilon: float = 1e-8,
    seed: int | None = None,
    stream: StreamOptions | None = None,
) -> AlphaReport:
    """alpha*, the weight of the trace gradient that minimises the error of a step, of a policy on preference pairs.

    The report prints as its answer, shows tables in notebooks (``report.print()`` elsewhere) and draws (``plot``).

    Args:
        policy: The policy at theta, dropout off (`bvpo_stats.load_policy`).
        pairs: D_t and D_e together, told apart by their ``mode``; or D_t alone, with D_e as ``empty_pairs``. Records,
            rows or datasets in any layout of `bvpo_stats.sampling.layouts.as_pairs`, a file, the folder of a run or
            ``"embedded"``. Prompts that lack one kind are left out.
        empty_pairs: D_e, where it stands apart.
        traces: Trace bank of the D_t pairs, where theta is not theta_ref.
        batch_size: Examples per optimizer step, B.
        eta_l: Learning rate times smoothness.
        level: Confidence level.
        objective: The loss; None for that of ``stream``, DPO unless it says otherwise.
        marginal: Estimator of the marginal gradient; None for ``stream``'s, by default the best that the data allow.
        groups: Jackknife groups: a number, or ``auto`` (single prompts up to 256, then twenty).
        lora: The fresh adapter that stands for theta where the policy has none and no ``subset`` is given, or its rank;
            the policy itself stays as it is.
        theta: ``lora`` for the adapter; ``probe`` for every Linear weight of the model, seen through a Gaussian probe,
            whose draw's part of the error is in the intervals; else a pattern of layer names.
        probe_rank: Rank of the probe.
        subset: The parameters theta; None for what ``theta`` says.
        curvature: Measure eta L with this instead of taking ``eta_l``.
        optimizer: ``adamw`` or ``sgd``: eta L of its steps is measured, in its metric, and alpha* said there. That of
            ``adamw`` is of ``second_moments``, without them of the second moments of these gradients.
        learning_rate: Its eta.
        second_moments: Adam's second moments by parameter name, as steps divide by them, for alpha in Adam's metric.
        epsilon: Adam's epsilon.
        seed: Decides every draw; None for ``stream``'s.
        stream: Budgets and whatever else decides how prompts become gradients; None for what the command does.

    Raises:
        UserError: Anything wrong with the input; see the message.

    Example:
        >>> from bvpo_stats.model.policy import load_policy
        >>> report = alpha_star(load_policy("embedded", lora=4), "embedded", batch_size=128)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
        At batch size 128 and eta L = 1, alpha* = 0.9... (95% interval 0.9... to 1.000). ...
    """
    policy = as_policy(policy)
    if stream is not None:
        check_kind("stream", stream, StreamOptions, "StreamOptions")
    if curvature is not None:
        check_kind("curvature", curvature, CurvatureOptions, "CurvatureOptions")
    if second_moments is not None:
        check_kind("second_moments", second_moments, Mapping, "a dictionary of arrays by parameter name")
    check_positive("epsilon", epsilon)
    if marginal is not None:
        check_choice("marginal", marginal, get_args(MarginalMethod))
    if groups != "auto":
        check_whole("groups", groups, low=2)
    said = {"objective": objective, "method": marginal, "seed": seed}
    stream = replace(stream or _options(AlphaConfig()).stream, **{name: x for name, x in said.items() if x is not None})  # type: ignore[arg-type]
    settings = AlphaSettings(batch_size, eta_l, level)
    options = AlphaOptions(stream, settings, groups, curvature, second_moments, epsilon, optimizer, learning_rate)
    if optimizer == "sgd" and second_moments is not None:
        raise UserError("`second_moments` are the metric of Adam's kin, and `optimizer='sgd'` has none; leave one out.")
    if second_moments is not None:
        options = replace(options, metric="1 / (sqrt(v) + eps) of the given second moments")
    if subset is not None:
        check_kind("subset", subset, Subset, "a Subset")
        words = "given parameters"
    else:
        if not isinstance(lora, LoraOptions):
            lora = LoraOptions(seed=stream.seed) if lora is None else LoraOptions(r=lora, seed=stream.seed)
        policy, subset, words = prepare_subset(policy, lora=lora, theta=theta, probe=Probe(probe_rank, stream.seed))
    bank = read_records(traces, TraceRecord, name="traces", vocabulary=policy.template.vocabulary)
    joined = join(all_pairs(pairs, empty_pairs, policy.template), bank, unmatched="drop")
    return _estimate(policy, subset, joined, options, words)


def _estimate(
    policy: Policy,
    subset: Subset,
    joined: Joined,
    options: AlphaOptions,
    words: str,
    folder: Path | None = None,
    world: World | None = None,
) -> AlphaReport:
    """Moments of all prompts, in parts by process, and the report of the first one in all of them."""
    world, examples = world or World(), joined.examples
    if subset.probe is not None and (options.optimizer is not None or options.second_moments is not None):
        named = "optimizer" if options.optimizer is not None else "second_moments"
        raise UserError(
            f"`{named}` needs the gradients themselves, weight by weight, and a probe sees inner products only; leave "
            "it out, or name fewer layers by a pattern instead of `theta='probe'`."
        )
    _check_groups(joined.prompts, options.groups)
    choice = world.broadcast(choose_marginal(policy, examples, options.stream) if world.leads else None)
    assert choice is not None  # rank 0 made one
    if options.optimizer == "adamw" and not options.metric:
        second = world.broadcast(
            _own_second_moments(policy, subset, examples, options, folder) if world.leads else None
        )
        metric = f"1 / (sqrt(v) + eps) of these gradients' second moments at batch size {options.settings.batch_size:g}"
        options = replace(options, second_moments=second, metric=metric)
    state = _stream(policy, subset, examples, options, choice, folder, world)
    moments = state.moments.reduce(world)
    noise = {}
    if choice.rung == "small drift" or options.optimizer is not None:
        noise = state.moments.contrasts(world, by_group=options.optimizer is not None)
    diagnostics = [entry for part in world.gather(state.diagnostics) for entry in part]
    report = None
    if moments is not None:
        found = Found(moments, state.moments.plan, noise, sorted(diagnostics, key=lambda d: (d.prompt_id, d.side)))
        sampler = _sampler(policy, examples, options, folder)
        report = _report(policy, subset, joined, options, words, choice, found, sampler)
    sent = world.broadcast(report)
    assert sent is not None
    return sent


def _stream(
    policy: Policy,
    subset: Subset,
    examples: Sequence[Example],
    options: AlphaOptions,
    choice: MarginalChoice,
    folder: Path | None,
    world: World,
) -> Checkpoint:
    """Gradients of this process's prompts into moments, from where an earlier run stopped."""
    order = list(dict.fromkeys(example.prompt_id for example in examples))
    mine = order[world.rank :: world.size]
    file = Shard(world.rank + 1, world.size).file
    stream = replace(options.stream, method=choice.method)
    plan = moment_plan(policy, subset, examples, options, row_rules(policy, examples, stream))
    carried = subset.carried
    path = None if folder is None else file(folder, MOMENTS_FILE)
    sums = DeviceMoments(plan, mine, None if folder is None else file(folder, SUMS_FILE), _run_key(folder))
    checkpoint = Checkpoint(path, sums, policy.device)
    chosen = set(mine)
    own = [example for example in examples if example.prompt_id in chosen]
    if folder is not None and chosen - sums.done:
        say(_estimated(subset, plan, own, mine, choice, folder))
    try:
        with (
            spared(policy, min(options.stream.max_tokens, _tokens(own))),
            progress("Gradients", len(mine), "prompts", done=len(sums.done)) as advance,
        ):
            if chosen - sums.done:
                for batch in gradient_batches(policy, carried, own, stream, sums.done, plan.place):
                    checkpoint.add(batch)
                    advance(len(set(batch.prompt_ids)))
    finally:
        checkpoint.save()
    return checkpoint


def _tokens(examples: Sequence[Example]) -> int:
    """Tokens of all pairs and traces."""
    traces = (trace for example in examples for trace in example.traces)
    pairs = sum(pair.tokens for example in examples for pair in example.pairs)
    return int(pairs + sum(len(trace.prompt_ids) + len(trace.completion_ids) for trace in traces))


def moment_plan(
    policy: Policy, subset: Subset, examples: Sequence[Example], options: AlphaOptions, rules: RowRules
) -> MomentPlan:
    """What the pass over some examples sums up.

    Args:
        policy: The policy.
        subset: The parameters theta.
        examples: Those of all processes.
        options: Groups, and the metric.
        rules: Which gradients are formed.
    """
    members = tuple(name for name in rules.members if name not in ("m1", "m2"))
    counts = Counter(example.prompt_id for example in examples)
    carried, whole, metric = subset.carried, BlockLayout.of(subset), None
    if options.second_moments is not None:
        metric = block_metric(carried, options.second_moments, options.epsilon)
    return MomentPlan(
        members=members,
        contrast="m1" in rules.members,
        counts=dict(counts),
        n_groups=jackknife_groups(len(counts), whole.size, len(members), options.groups),
        layout=BlockLayout.of(carried),
        whole=whole,
        metric=metric,
        probe=0 if subset.probe is None else subset.probe.rank,
    )


def _run_key(folder: Path | None) -> str:
    """What tells a run's files from those of others."""
    path = None if folder is None else folder / RUN_FILE
    return "" if path is None or not path.exists() else sha256_of(path)


METRIC_PROMPTS = 128
"""Most prompts, spread evenly, whose gradients give v where no optimizer's state does."""


def _own_second_moments(
    policy: Policy, subset: Subset, examples: Sequence[Example], options: AlphaOptions, folder: Path | None
) -> dict[str, NDArray[Any]]:
    """What Adam's v settles at on mini-batches of the paper's mix: ``(E g)^2 + Var g / B``, coordinate by coordinate.

    ``(E g)^2`` is unbiased, not below 0. A pass over some prompts before the main one; kept in the run's folder.
    """
    path = None if folder is None else folder / METRIC_FILE
    if path is not None and path.exists():
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    prompts = list(dict.fromkeys(example.prompt_id for example in examples))
    places = np.linspace(0, len(prompts) - 1, min(METRIC_PROMPTS, len(prompts))).round().astype(int)
    chosen = {prompts[place] for place in places}
    some = [example for example in examples if example.prompt_id in chosen]
    stream = replace(options.stream, method="none", half_splits=False, second_traces=False)
    count, sums, squares = 0, dict[str, NDArray[Any]](), dict[str, NDArray[Any]]()
    with progress("The optimizer's metric", len(chosen), "prompts") as advance:
        for batch in gradient_batches(policy, subset.carried, some, stream):
            for block, t in batch.vectors["t"].items():
                mixed = (t.astype(np.float64) + batch.vectors["e"][block]) / 2
                sums[block] = sums.get(block, 0.0) + mixed.sum(axis=0)
                squares[block] = squares.get(block, 0.0) + (mixed**2).sum(axis=0)
            count += len(batch.prompt_ids)
            advance(len(set(batch.prompt_ids)))
    found = {}
    for name, (block, offset, size) in BlockLayout.of(subset.carried).places.items():
        mean, square = (total[block][offset : offset + size] / count for total in (sums, squares))
        variance = np.maximum(square - mean**2, 0.0) * count / (count - 1)
        found[name] = np.maximum(mean**2 - variance / count, 0.0) + variance / options.settings.batch_size
    if path is not None:
        with replacing(path) as handle:
            np.savez(handle, **found)  # type: ignore[arg-type]
    return found


def _estimated(
    subset: Subset,
    plan: MomentPlan,
    examples: Sequence[Example],
    prompts: Sequence[str],
    choice: MarginalChoice,
    folder: Path,
) -> str:
    """What a pass takes, in words.

    Raises:
        UserError: Its moments do not fit the disk.
    """
    tokens = sum(pair.tokens for example in examples for pair in example.pairs)
    banks = "" if choice.method == "reference-point" else ", those of traces apart"
    still = subset.size - plan.layout.size
    zero = f" ({still:,} of them, the A of LoRA where B = 0, have no gradient and take no room)" if still else ""
    return (
        f"Gradients: {len(examples):,} pairs of pairs, {tokens:,} tokens{banks}, by {subset.size:,} parameters{zero}. "
        f"Their moments take about {spoken_bytes(plan.open_bytes)} beside the model, and as {SUMS_FILE} and "
        f"{MOMENTS_FILE} {check_room(folder, plan.file_bytes(prompts))}: they answer for other batch and step sizes "
        "without the model; delete them when you need no more of these."
    )


def _report(
    policy: Policy,
    subset: Subset,
    joined: Joined,
    options: AlphaOptions,
    words: str,
    choice: MarginalChoice,
    found: Found,
    sampler: SamplerRatio,
) -> AlphaReport:
    settings, measured, drift, examples = options.settings, None, None, joined.examples
    if options.curvature is not None:
        pairs = [example.both[0] for example in examples]
        curvature = measure_curvature(policy, subset, pairs, options.stream.objective, options.curvature)
        settings = replace(settings, eta_l=curvature.eta_l)
        measured = asdict(curvature)
    moments, step = found.moments, None
    if options.optimizer is not None:
        step = _optimizer_step(policy, subset, examples, options, found)
        if options.measured_eta_l:
            settings = replace(settings, eta_l=step.eta_l)
    if choice.rung == "small drift":
        drift = _drift_bound(policy, subset, examples, options, found)
    return AlphaReport.of(
        moments.moments,
        marginal_entry(choice, found.diagnostics),
        settings,
        adam=moments.adam,
        step=step,
        tokens=_pair_tokens(examples),
        halves=moments.halves,
        drift=drift,
        warnings=(
            *_metric_warnings(step),
            *bias_warnings(choice, examples),
            *bank_warnings(joined, choice, found.diagnostics),
            *sampler.cautions,
        ),
        sampler=sampler,
        model=policy.identity,
        template=policy.template.name,
        objective=objective_words(options.stream.objective),
        subset=theta_words(policy, subset, words) + _projection_words(moments.moments, settings),
        n_parameters=subset.size,
        n_second_draws=moments.second_draws,
        n_drawn_prompts=moments.drawn_prompts,
        seed=options.stream.seed,
        curvature=measured,
    )


def _sampler(policy: Policy, examples: Sequence[Example], options: AlphaOptions, folder: Path | None) -> SamplerRatio:
    """How far the policy is from the sampler of the D_t pairs; kept in the run's folder, as the moments are."""
    path = None if folder is None else folder / SAMPLER_FILE
    if path is not None and path.exists():
        with contextlib.suppress(OSError, ValueError, TypeError):  # damaged: made again
            return SamplerRatio(**json.loads(path.read_text(encoding="utf-8")))
    pairs = (example.both[0] for example in examples)
    found = sampler_ratio(policy, pairs, reference=True, max_tokens=options.stream.max_tokens)
    if path is not None:
        write_atomic(path, json.dumps(asdict(found)) + "\n")
    return found


def _projection_words(summary: MomentSummary, settings: AlphaSettings) -> str:
    """What the draw of a probe adds to the error of alpha."""
    variance = LinearRatio.alpha(summary, noise_scale(settings.batch_size, settings.eta_l)).projected
    if variance is None:
        return ""
    added = math.sqrt(float(variance))
    return f"; the draw of the probe moves alpha by about {added:.2g}, which is in the intervals of all weights"


def _drift_bound(
    policy: Policy, subset: Subset, examples: Sequence[Example], options: AlphaOptions, found: Found
) -> DriftBound:
    """Bounds g_t's bias along h = E g_t - E g_e, by a second pass over the D_t pairs now that h is known."""
    sizes = found.moments.moments.group_sizes if len(next(iter(found.noise.values()))) > 1 else np.ones(1)
    direction = {block: (sizes @ rows / sizes.sum())[None] for block, rows in found.noise.items()}
    sides = project_sides(policy, subset.carried, examples, direction, options.stream)
    level = (1 + options.settings.level) / 2
    return drift_bound(sides.log_ratios, sides.projections[..., 0], options.stream.objective.beta, level)


def _optimizer_step(
    policy: Policy, subset: Subset, examples: Sequence[Example], options: AlphaOptions, found: Found
) -> OptimizerStep:
    """Eta L of the optimizer's steps, by a second pass over D_t pairs along the noise of the groups' means."""
    assert options.optimizer is not None
    assert options.learning_rate is not None
    plan, noise = found.plan, found.noise
    if plan.metric is not None:
        noise = {block: rows * plan.metric[block] for block, rows in noise.items()}
    sides = project_sides(policy, subset.carried, examples, noise, options.stream, "Measuring eta L")
    own = plan.group_labels[[plan.place[prompt] for prompt in sides.prompt_ids]]
    curved = noise_curvature(sides.slopes(options.stream.objective), own, found.moments.moments.group_sizes)
    return OptimizerStep.of(
        found.moments.adam or found.moments.moments,
        curved,
        len(own),
        name=options.optimizer,
        learning_rate=options.learning_rate,
        metric=options.metric or "that of SGD: the identity",
        settings=options.settings,
    )


def _metric_warnings(step: OptimizerStep | None) -> tuple[str, ...]:
    """Says that SGD's metric stands in for another optimizer's."""
    if step is None or step.name == "sgd" or not step.metric.startswith("that of SGD"):
        return ()
    return (f"The metric of {step.name} is {step.metric}",)


def _pair_tokens(examples: Sequence[Example]) -> tuple[float, float]:
    """Mean tokens of a D_t and of a D_e pair."""
    thinking, nothinking = (sum(example.both[k].tokens for example in examples) for k in (0, 1))
    return thinking / len(examples), nothinking / len(examples)


def objective_words(objective: Objective) -> dict[str, Any]:
    """The loss under the name that users know it by, with the constants it has."""
    names = {ours: theirs for theirs, ours in LOSSES.items()}
    words: dict[str, Any] = {"loss": names[objective.name], "beta": objective.beta}
    return words | ({"gamma": objective.gamma} if objective.name == "simpo" else {})


def _identity(
    config: AlphaConfig, lora: LoraOptions, options: AlphaOptions, policy: Policy, words: str
) -> dict[str, Any]:
    """What decides the moments; batch size, step size and level do not."""
    stream = options.stream
    return {
        "model": policy.identity,
        "template": policy.template.name,
        "dtype": str(policy.model.dtype),
        "theta": words,
        "params": list(config.params),
        "lora": None if config.policy.adapter else asdict(lora),
        "objective": asdict(stream.objective),
        "marginal": stream.method,
        "traces_per_answer": stream.traces_per_answer,
        "half_splits": stream.half_splits,
        "reference": stream.reference,
        "groups": config.groups,
        "limit": config.inputs.limit,
        "seed": stream.seed,
        "optimizer_state": None if options.second_moments is None else _digest(options.second_moments),
        # v of these gradients depends on the batch size, so moments in its metric do.
        **(
            {"adamw_batch_size": options.settings.batch_size}
            if options.optimizer == "adamw" and not options.metric
            else {}
        ),
    }


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Arrays by content, in 16 hex digits."""
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        digest.update(f"{name}:{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:16]


def _check_groups(n_prompts: int, groups: int | Literal["auto"]) -> None:
    """Refuses a jackknife with more groups than prompts.

    Raises:
        UserError: Fewer prompts than groups, or than three.
    """
    if n_prompts < (3 if groups == "auto" else groups):
        least = "three, the least for an interval" if groups == "auto" else f"the {groups} jackknife groups"
        raise UserError(
            f"{n_prompts} prompts with both a D_t and a D_e pair are fewer than {least}; give more pairs (some hundred "
            "are usual)."
        )


def prepare_subset(
    policy: Policy,
    params: Sequence[str] = (),
    lora: LoraOptions | None = None,
    *,
    theta: str = "lora",
    probe: Probe | None = None,
) -> tuple[Policy, Subset, str]:
    """The policy with its parameters selected: a loaded adapter's, named weights, or those of a fresh LoRA adapter.

    A fresh adapter has B = 0, hence theta = theta_ref.

    Args:
        policy: The policy; it stays as it is.
        params: Patterns of layer names (see :mod:`bvpo_stats.model.subset`): of the adapter's layers where the policy
            has one, else of the Linear weights of the model itself.
        lora: The new adapter, where the policy has none and no patterns are given.
        theta: ``lora`` for all of this; ``probe`` for every Linear weight of the model (or those that match ``params``)
            through a Gaussian probe; else one more pattern of ``params``.
        probe: Its rank and seed.

    Returns:
        The policy (wrapped, where an adapter was added), the subset, and the choice in words.

    Raises:
        UserError: The selection is empty or not supported.
    """
    if theta == "probe":
        subset = probe_subset(policy.model, probe, params)
        layers, drawn = f"weights of {', '.join(params)}" if params else "all Linear weights", subset.probe
        assert drawn is not None
        rest = uncovered_share(policy.model, subset)
        return (
            policy,
            subset,
            (
                f"{layers}, seen through a Gaussian probe of rank {drawn.rank} (seed {drawn.seed}); {rest:.1%} of the "
                f"model's parameters {'(embeddings, head, norms, biases) ' if not params else ''}are not among them"
            ),
        )
    if theta != "lora":
        params = (*params, theta)
    if hasattr(policy.model, "disable_adapter"):
        layers = f", layers {', '.join(params)}" if params else ""
        return policy, lora_subset(policy.model, params or None), f"loaded adapter{layers}"
    if params:
        return policy, linear_subset(policy.model, params), f"weights of {', '.join(params)}"
    lora = lora or LoraOptions()
    policy = with_lora(policy, lora)
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    return policy, lora_subset(policy.model), f"fresh LoRA adapter, rank {lora.r}, on {targets}"


def theta_words(policy: Policy, subset: Subset, words: str) -> str:
    """What theta is, and what the start of LoRA means for it: the gradient of A is B' times something, so zero.

    Args:
        policy: The policy at theta.
        subset: The parameters theta.
        words: What they are.
    """
    if policy.at_reference and any(".lora_A." in name for name in subset.parameters):
        return f"{words} (with B = 0, so that only the B half has a gradient yet and A has none)"
    return words


def load_examples(inputs: AlphaInputs, policy: PolicyOptions | None = None) -> Joined:
    """Pairs and traces of the prompts that have both a D_t and a D_e pair, joined.

    Args:
        inputs: Where they are.
        policy: Whose template judges records and renders pairs that are none yet (TRL's layouts); the embedded model's
            when None.

    Raises:
        UserError: Records are missing fields, a file holds the wrong kind of pairs, or no prompt has both.
    """
    template = load_template(policy or PolicyOptions())
    pairs = (pair for mode in MODES for pair in load_set(inputs, mode, template))
    return join(pairs, load_traces(inputs, template), unmatched="drop", limit=inputs.limit)


def load_set(inputs: AlphaInputs, mode: Mode, template: Template) -> list[PreferencePair]:
    """All pairs of D_t (``thinking``) or D_e (``nothinking``); see `load_examples`.

    Raises:
        UserError: The file is missing, records lack fields, or it holds the wrong kind of pairs.
    """
    path, option = inputs.set_path(mode), "pairs" if mode == "thinking" else "empty_pairs"
    pairs = read_pairs(path, template, mode, name=option)
    if not pairs:
        raise UserError(f"`{option}={str(path)!r}` holds no pairs.")
    for pair in pairs:
        if pair.mode != mode:
            raise UserError(
                f"`{option}={str(path)!r}`: the pair of prompt {pair.prompt_id} is a {pair.mode} pair; {mode} pairs "
                "are needed here."
            )
    return pairs


def load_traces(inputs: AlphaInputs, template: Template) -> Iterator[TraceRecord]:
    """The bank's traces, one at a time; none where there is no bank.

    Raises:
        UserError: The bank is missing or empty, or records are missing fields.
    """
    path = inputs.traces_path()
    if path is None:
        return
    empty = True
    for trace in read_records(path, TraceRecord, vocabulary=template.vocabulary):
        empty = False
        yield trace
    if empty:
        raise UserError(f"`traces={str(path)!r}` holds no traces. Leave it out, or make the bank again.")


def fingerprints(inputs: AlphaInputs) -> dict[str, str | None]:
    """Hashes of the input files: what tells two runs apart."""
    names = ("pairs", "empty_pairs", "traces")
    return {name: None if path is None else fingerprint(path) for name, path in zip(names, inputs.paths(), strict=True)}


def marginal_entry(choice: MarginalChoice, diagnostics: Sequence[SideDiagnostics]) -> Marginal:
    """The report's section on the marginal gradient; medians are over answers.

    Args:
        choice: Rung of the ladder.
        diagnostics: Trace weights of every answer; empty where the method uses no traces.
    """
    weights = [entry.weights for entry in diagnostics]
    gaps = [w.anchor_gap for w in weights if w.anchor_gap is not None]
    tails = [w.k_hat for w in weights if w.k_hat is not None]
    tested = [w.certified for w in weights if w.anchor_gap is not None or w.k_hat is not None]
    return Marginal(
        method=choice.method,
        rung=choice.rung,
        reason=choice.reason,
        estimable=choice.estimable,
        traces_per_answer=_median([float(w.traces) for w in weights]),
        ess=_median([w.effective_size for w in weights]),
        largest_weight=_median([w.largest for w in weights]),
        anchor_gap=_median(gaps),
        log_traces=_median([w.log_traces for w in weights]),
        k_hat=_median(tails),
        k_threshold=_median([w.k_threshold for w in weights if math.isfinite(w.k_threshold)]),
        certified_share=sum(tested) / len(tested) if tested else None,
        distinct=_median([float(w.distinct) for w in weights if w.distinct]),
        answers={
            "ess": [finite(w.effective_size) for w in weights],
            "anchor_gap": [None if w.anchor_gap is None else finite(w.anchor_gap) for w in weights],
        },
    )


def bias_warnings(choice: MarginalChoice, examples: Sequence[Example]) -> tuple[str, ...]:
    """Flags an estimator of mu that is biased by construction here: that bias shifts alpha, and no prompts cure it.

    Self-normalised weights are unbiased only where one trace is an exact posterior draw of theta; a pair's own trace is
    one at theta_ref and temperature 1, nowhere else. The antithetic multilevel estimate
    is left with one of order 1/K^2, because a bank of K traces ends its levels.

    Args:
        choice: Rung of the ladder.
        examples: For the temperature of pairs (the anchors) and traces.
    """
    off_reference = choice.drift > 0
    cooled = any(record.temperature != 1 for example in examples for record in example.records)
    biased = choice.method in ("prior", "jackknife") or (
        choice.method in ("anchored", "posterior") and (off_reference or cooled)
    )
    if not biased or not choice.estimable:
        return ()
    return (
        f"The {choice.method} estimate of mu is biased by construction here (of order 1/K for K traces): alpha shifts "
        "by E(g_t - g_e) . bias / A, which more prompts do not reduce. More traces do; `method='multilevel'` "
        "leaves a bias of order 1/K^2.",
    )


def bank_warnings(joined: Joined, choice: MarginalChoice, diagnostics: Sequence[SideDiagnostics]) -> tuple[str, ...]:
    """What is odd about the pairs and the bank: responses that were cut, records that repeat, copies of one trace.

    Args:
        joined: The examples.
        choice: Rung of the ladder.
        diagnostics: Trace weights of every answer.
    """
    found = []
    pair = joined.examples[0].both[0]
    lost = (pair.cut_share or 0.0) + (pair.unclosed_share or 0.0)
    if choice.estimable and choice.method != "reference-point" and lost > MOST_LOST:
        found.append(
            f"{lost:.1%} of the responses behind D_t were cut or never closed their trace. mu is that of the responses "
            "that fit under the limit, as the traces of the bank do; raise `max_new_tokens` of `sample`."
        )
    if joined.repeated:
        found.append(f"{joined.repeated} records of the trace bank repeat others, number included; counted once.")
    several = [entry.weights for entry in diagnostics if entry.weights.traces > 1]
    copies = sum(weights.distinct == 1 for weights in several)
    if several and copies > _MANY_COPIES * len(several):
        found.append(
            f"Behind {copies} of {len(several)} answers all traces are one and the same: the bank has not seen their "
            "posterior move. Make it with more moves: `mh_moves` of `traces`."
        )
    return tuple(found)


def _median(values: Sequence[float]) -> float | None:
    return finite(median(values)) if values else None


@dataclass(frozen=True)
class Found:
    """What a pass found, at the first process.

    Attributes:
        moments: U, M and shift.
        plan: What was summed.
        noise: Block to t - e of all examples ``[1, d]`` or of each group ``[G, d]``, where something needs it.
        diagnostics: Trace weights of all answers.
    """

    moments: PassMoments
    plan: MomentPlan
    noise: dict[str, NDArray[Any]]
    diagnostics: list[SideDiagnostics]


class Checkpoint:
    """The files of a pass: saved now and then, so that a kill costs little and saving even less.

    Closed groups lie in a file of their own; what is known besides, and the open group, is in a small one.
    """

    def __init__(self, path: Path | None, moments: DeviceMoments, device: torch.device) -> None:
        """Goes on from the files, where there are any.

        Args:
            path: The small file; None to keep nothing.
            moments: Of this pass.
            device: Where its open group belongs.

        Raises:
            UserError: The files are damaged or another run's.
        """
        self._path, self.moments, self.diagnostics = path, moments, list[SideDiagnostics]()
        if path is not None and path.exists():
            try:
                with np.load(path, allow_pickle=False) as stored:
                    arrays = dict(stored)
                rows = json.loads(str(arrays.pop("diagnostics")))
                moments.restore(arrays, device)
            except Exception as error:  # numpy raises many kinds for damaged files
                raise UserError(f"Cannot go on from {path} ({error}). Delete it to start over.") from error
            self.diagnostics = [
                SideDiagnostics(**{**row, "weights": WeightDiagnostics(**row["weights"])}) for row in rows
            ]
        self._saved, self._whole = len(moments.done), True
        self._next_save = time.monotonic() + _SAVE_EVERY_SECONDS

    def add(self, batch: GradientBatch) -> None:
        """Adds a batch, and saves what is known if the last save is long enough ago.

        Raises:
            UserError: As in `DeviceMoments.add`.
        """
        self._whole = False  # until all of it is in: nothing else is to be saved
        self.moments.add(batch)
        self.diagnostics += batch.diagnostics
        self._whole = True
        if time.monotonic() >= self._next_save:
            self.save()

    def save(self) -> None:
        """Writes what is known, unless it is on disk already.

        Raises:
            UserError: The disk is full.
        """
        if self._path is None or not self._whole or self._saved == len(self.moments.done):
            return
        started = time.monotonic()
        rows = np.array(json.dumps([asdict(entry) for entry in self.diagnostics]))
        with replacing(self._path) as handle:
            np.savez(handle, diagnostics=rows, **self.moments.to_arrays())  # type: ignore[arg-type]
        self._saved = len(self.moments.done)
        now = time.monotonic()
        self._next_save = now + max(_SAVE_EVERY_SECONDS, _SAVE_SHARE * (now - started))


def block_metric(
    subset: Subset, second_moments: dict[str, NDArray[Any]], epsilon: float = 1e-8
) -> dict[str, NDArray[Any]]:
    """Diagonal of Adam's metric for every block, its weights strung together as in the gradients.

    Args:
        subset: The parameters.
        second_moments: Adam's second moments by parameter name, flat.
        epsilon: Adam's epsilon.
    """
    layout = BlockLayout.of(subset)
    lacking = [name for name in layout.places if name not in second_moments]
    if lacking:
        raise UserError(f"`second_moments` lacks {len(lacking)} of theta's parameters, e.g. {lacking[0]}.")
    return layout.strung(adam_metric(second_moments[name], epsilon) for name in layout.places)
