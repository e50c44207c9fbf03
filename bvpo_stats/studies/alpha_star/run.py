"""The alpha-star study: stream gradients into moments, resume, merge processes, report (Theorems 1, 2 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from bvpo_stats.distributed import World, joined_world
from bvpo_stats.errors import UserError
from bvpo_stats.gradients.curvature import CurvatureOptions, measure_curvature
from bvpo_stats.gradients.examples import Example, join
from bvpo_stats.gradients.ladder import MarginalChoice, choose_marginal
from bvpo_stats.gradients.objectives import LOSSES, Objective
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.stream import gradient_batches, project_sides
from bvpo_stats.model.policy import Policy, load_policy, on_own_device
from bvpo_stats.model.subset import LoraOptions, Subset, lora_subset, read_second_moments
from bvpo_stats.progress import progress
from bvpo_stats.records import PreferencePair, TraceRecord
from bvpo_stats.statistics.bounds import DriftBound, drift_bound
from bvpo_stats.statistics.moments import Moments
from bvpo_stats.store.run_folder import open_run
from bvpo_stats.store.shards import Shard
from bvpo_stats.studies.alpha_star.analysis import Measured, analyse, check_groups
from bvpo_stats.studies.alpha_star.config import AlphaConfig
from bvpo_stats.studies.alpha_star.inputs import (
    SubsetOptions,
    fingerprints,
    load_examples,
    prepare_subset,
    theta_words,
)
from bvpo_stats.studies.alpha_star.marginal import bias_warnings, marginal_entry
from bvpo_stats.studies.alpha_star.report import AlphaReport
from bvpo_stats.studies.alpha_star.settings import AlphaContext, AlphaSettings
from bvpo_stats.studies.alpha_star.state import MOMENTS_FILE, Checkpoint, PassState, block_metric, merge_states


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
    """

    stream: StreamOptions = field(default_factory=StreamOptions)
    settings: AlphaSettings = field(default_factory=AlphaSettings)
    groups: int | Literal["auto"] = "auto"
    curvature: CurvatureOptions | None = None
    second_moments: dict[str, NDArray] | None = None
    epsilon: float = 1e-8


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
        check_groups(joined.prompts, config.groups)
        policy, subset, words = prepare_subset(
            load_policy(on_own_device(config.policy, world.local_rank, world.size)), _subset_options(config)
        )
        options = _options(config)
        if config.optimizer_state is not None:
            options = replace(options, second_moments=read_second_moments(config.optimizer_state, subset))
        identity |= _identity(config, policy, words)
        with open_run(output, "alpha-star", identity, shard=Shard(world.rank + 1, world.size)) as folder:
            report = _estimate(policy, subset, joined.examples, _Pass(options, words, folder, world))
            if world.leads:
                report.write(folder)
        return report if world.leads else None


def _subset_options(config: AlphaConfig) -> SubsetOptions:
    lora = LoraOptions(r=config.lora_r, targets=config.target_modules, seed=config.seed)
    return SubsetOptions(params=config.params, lora=lora)


def _options(config: AlphaConfig) -> AlphaOptions:
    curvature = None
    if config.eta_l == "auto":
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
            method=config.interval,
        ),
        groups=config.groups,
        curvature=curvature,
    )


def estimate_alpha_star(
    policy: Policy,
    pairs: Sequence[PreferencePair],
    *,
    traces: Sequence[TraceRecord] = (),
    subset: Subset | None = None,
    options: AlphaOptions | None = None,
) -> AlphaReport:
    """alpha* of a policy on preference pairs, with intervals, curves, layers and diagnostics.

    Args:
        policy: The policy at theta, dropout off (`bvpo_stats.model.policy.load_policy`).
        pairs: D_t and D_e records together, told apart by their ``mode``; prompts that lack one kind are left out.
        traces: Trace bank of the D_t pairs, where theta is not theta_ref.
        subset: The parameters theta; None for the policy's LoRA adapter.
        options: Loss, batch size, step size, level, marginal estimator.

    Raises:
        UserError: Anything wrong with the input; see the message.
    """
    options = options or AlphaOptions()
    joined = join(pairs, traces, unmatched="drop")
    check_groups(joined.prompts, options.groups)
    words = "given parameters" if subset is not None else "LoRA adapter"
    return _estimate(policy, subset or lora_subset(policy.model), joined.examples, _Pass(options, words))


@dataclass(frozen=True)
class _Pass:
    """What a pass over the prompts needs besides policy and pairs."""

    options: AlphaOptions
    words: str
    folder: Path | None = None
    world: World = field(default_factory=World)


def _estimate(policy: Policy, subset: Subset, examples: Sequence[Example], run: _Pass) -> AlphaReport:
    options, world = run.options, run.world
    choice = world.broadcast(choose_marginal(policy, examples, options.stream) if world.leads else None)
    assert choice is not None  # rank 0 made one
    state = _stream(policy, subset, examples, run, choice)
    states = world.gather(state.to_arrays())
    report = None
    if world.leads:
        merged = merge_states(PassState.from_arrays(arrays) for arrays in states)
        report = _report(policy, subset, examples, run, (choice, merged))
    sent = world.broadcast(report)
    assert sent is not None
    return sent


def _stream(
    policy: Policy, subset: Subset, examples: Sequence[Example], run: _Pass, choice: MarginalChoice
) -> PassState:
    """Gradients of this process's prompts into moments, from where an earlier run stopped."""
    options, world = run.options, run.world
    order = list(dict.fromkeys(example.prompt_id for example in examples))
    mine = set(order[world.rank :: world.size])
    shard = Shard(world.rank + 1, world.size)
    checkpoint = Checkpoint(None if run.folder is None else shard.file(run.folder, MOMENTS_FILE))
    metric = None
    if options.second_moments is not None:
        metric = block_metric(subset, options.second_moments, options.epsilon)
    stream = replace(options.stream, method=choice.method)
    own = [example for example in examples if example.prompt_id in mine]
    try:
        with progress("Gradients", len(mine), "prompts", done=len(checkpoint.state.done)) as advance:
            if mine - checkpoint.state.done:
                for batch in gradient_batches(policy, subset, own, stream, checkpoint.state.done):
                    checkpoint.update(checkpoint.state.add(batch, len(order), options.groups, metric))
                    advance(len(set(batch.prompt_ids)))
    finally:
        checkpoint.save()
    return checkpoint.state


def _report(
    policy: Policy,
    subset: Subset,
    examples: Sequence[Example],
    run: _Pass,
    found: tuple[MarginalChoice, PassState],
) -> AlphaReport:
    (choice, state), options = found, run.options
    if state.moments is None:
        raise UserError("No prompt gave gradients; check the pairs.")
    settings, measured = options.settings, None
    if options.curvature is not None:
        pairs = [example.both[0] for example in examples]
        curvature = measure_curvature(policy, subset, pairs, options.stream.objective, options.curvature)
        settings = replace(settings, eta_l=curvature.eta_l)
        measured = asdict(curvature)
    context = AlphaContext(
        model=policy.identity,
        template=policy.template.name,
        objective=objective_words(options.stream.objective),
        subset=theta_words(policy, subset, run.words),
        n_parameters=subset.size,
        seed=options.stream.seed,
        curvature=measured,
        warnings=bias_warnings(choice, examples),
    )
    measurements = Measured(
        state.moments.finalize(),
        marginal_entry(choice, state.diagnostics),
        n_second_draws=state.moments.n_second_draws,
        adam=None if state.adam is None else state.adam.finalize(),
        halves=None if state.halves is None else state.halves.finalize(),
        drift=_drift_bound(policy, subset, examples, run, state.moments) if choice.rung == "small drift" else None,
    )
    return analyse(measurements, settings, context)


def _drift_bound(
    policy: Policy, subset: Subset, examples: Sequence[Example], run: _Pass, moments: Moments
) -> DriftBound:
    """Bounds g_t's bias along h = E g_t - E g_e, by a second pass over the D_t pairs now that h is known."""
    options, (t, e) = run.options, (moments.mean(name) for name in ("t", "e"))
    direction = {block: t[block] - e[block] for block in t}
    sides = project_sides(policy, subset, examples, direction, options.stream)
    level = (1 + options.settings.level) / 2
    return drift_bound(sides.log_ratios, sides.projections, options.stream.objective.beta, level)


def objective_words(objective: Objective) -> dict[str, Any]:
    """The loss under the name that users know it by, with the constants it has."""
    names = {ours: theirs for theirs, ours in LOSSES.items()}
    words: dict[str, Any] = {"loss": names[objective.name], "beta": objective.beta}
    return words | ({"gamma": objective.gamma} if objective.name == "simpo" else {})


def _identity(config: AlphaConfig, policy: Policy, words: str) -> dict[str, Any]:
    """What decides the moments; batch size, step size and level do not."""
    stream, state = _options(config).stream, config.optimizer_state
    return {
        "model": policy.identity,
        "template": policy.template.name,
        "dtype": str(policy.model.dtype),
        "theta": words,
        "params": list(config.params),
        "lora": None if config.policy.adapter else asdict(_subset_options(config).lora),
        "objective": asdict(stream.objective),
        "marginal": stream.method,
        "traces_per_answer": stream.traces_per_answer,
        "half_splits": stream.half_splits,
        "reference": stream.reference,
        "groups": config.groups,
        "limit": config.inputs.limit,
        "seed": stream.seed,
        "optimizer_state": None if state is None else str(state),
    }
