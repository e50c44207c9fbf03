"""The pairs run: score final answers, choose best and worst, write D_t and D_e (Sections 3.3, 5.1 and C.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bvpo_stats.model.policy import Policy, load_policy, load_template
from bvpo_stats.progress import in_hand, progress, stage
from bvpo_stats.records import UNKNOWN, Completion, Mode, PreferencePair, to_dict
from bvpo_stats.sampling.pairs import ScoredCompletion, final_answers, prompt_pairs, reads_back, reference_logps
from bvpo_stats.sampling.rewards import Reward, load_reward, score_answers
from bvpo_stats.sampling.sample import SET_ASIDE_FILE, count_set_aside
from bvpo_stats.store.jsonl import RowLog, append_jsonl
from bvpo_stats.store.run_folder import open_run, run_files
from bvpo_stats.store.sample_index import SampleIndex, open_sample_index, samples_fingerprint
from bvpo_stats.studies.pairs.config import PairsConfig
from bvpo_stats.studies.pairs.report import ModeTally, PairsReport, write_run

if TYPE_CHECKING:
    from bvpo_stats.model.templates import Template

SCORES_FILE = "scores.jsonl"
REF_LOGPS_FILE = "ref_logps.jsonl"
_WINDOW = 64  # prompts in memory at a time
_REWARDS = 0.5  # of the time of a window, where log pi_ref is taken, too: as if a reward model were as large


@dataclass(frozen=True)
class _Run:
    """What the steps of a run share."""

    index: SampleIndex
    reward: Reward
    template: Template
    policy: Policy | None
    scores: RowLog
    ref_logps: RowLog
    min_gap: float


def run_pairs(config: PairsConfig, output: Path) -> PairsReport:
    """Makes (or resumes) D_t and D_e in a folder: JSONL, Parquet, report.

    Responses are read prompt by prompt through an on-disk index, so memory does not grow with their number. Rewards and
    reference log-probabilities are put on record as they come; a run that was killed goes on after the last of them.

    Raises:
        UserError: Anything wrong with the input; see the message.
    """
    if config.preferences is not None:
        from bvpo_stats.studies.pairs.preferences import run_preferences

        return run_preferences(config, config.preferences, output)
    assert config.samples is not None  # the configuration says so
    assert config.reward is not None
    fingerprint = samples_fingerprint(config.samples)
    template = load_template(config.policy)
    options = config.policy
    reward = load_reward(
        config.reward, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    policy = load_policy(options) if config.ref_logps else None
    identity = {
        "samples": fingerprint,
        "reward": reward.identity,
        "template": template.name,
        "modes": list(config.modes),
        "reference": policy.identity if policy else None,
        "dtype": str(policy.model.dtype) if policy else None,
        **({"min_gap": config.min_gap} if config.min_gap else {}),
    }
    with open_run(output, "pairs", identity) as folder:
        with open_sample_index(config.samples, folder / ".samples.sqlite", config.modes, template.vocabulary) as index:
            if policy is not None:
                index.source.check_sampling_model(policy.identity)
            scores, logps = RowLog(folder / SCORES_FILE), RowLog(folder / REF_LOGPS_FILE)
            run = _Run(index, reward, template, policy, scores, logps, config.min_gap)
            tallies, joint = _write_pairs(run, config.modes, folder)
        report = PairsReport(
            model=index.source.model or UNKNOWN,
            template=index.source.template or UNKNOWN,
            reward=reward.identity,
            n_prompts=index.source.n_prompts,
            n_responses=index.source.n_responses,
            half_written=index.source.half_written,
            set_aside=count_set_aside(run_files(config.samples, SET_ASIDE_FILE)),
            in_both_modes=joint if len(config.modes) == 2 else None,
            modes={mode: tally.summary() for mode, tally in tallies.items()},
            ref_logps=config.ref_logps,
            truncation={mode: index.source.truncation[mode] for mode in config.modes},
        )
        write_run(report, folder)
    return report


def _write_pairs(run: _Run, modes: Sequence[Mode], folder: Path) -> tuple[dict[Mode, ModeTally], int]:
    """Writes each mode's pairs, in the order of prompt ids, and moves them into place when all are there."""
    parts = {mode: folder / f"{mode}.jsonl.part" for mode in modes}
    for part in parts.values():
        part.write_bytes(b"")
    tallies = {mode: ModeTally() for mode in modes}
    joint = 0
    with progress("Pairing", run.index.source.n_prompts, "prompts") as advance:
        for window in run.index.windows(_WINDOW):
            with in_hand(len(window)), stage(0.0, 1.0 if run.policy is None else _REWARDS):
                pairs = [pair for responses in _scored(run, window) for pair in _pairs(run, responses, modes, tallies)]
            joint += len(pairs) - len({pair.prompt_id for pair in pairs})
            if run.policy is not None:
                with in_hand(len(window)), stage(_REWARDS, 1.0):
                    pairs = _with_ref_logps(run, run.policy, pairs)
            for mode, part in parts.items():
                append_jsonl(part, (to_dict(pair) for pair in pairs if pair.mode == mode), sums=False)
            advance(len(window))
    for mode, part in parts.items():
        part.replace(folder / f"{mode}.jsonl")
    return tallies, joint


def _scored(run: _Run, window: list[list[Completion]]) -> Iterator[list[ScoredCompletion]]:
    """The window's responses with the rewards of those that have a final answer."""
    answers = final_answers(c for responses in window for c in responses)
    keys = [{"prompt_id": a.prompt_id, "mode": a.mode, "sample_index": a.sample_index} for a in answers]
    rows = iter(run.scores.rows(keys, lambda: [{"reward": score} for score in score_answers(run.reward, answers)]))
    for responses in window:
        yield [ScoredCompletion(c, next(rows)["reward"] if c.complete else None) for c in responses]


def _pairs(
    run: _Run, responses: list[ScoredCompletion], modes: Sequence[Mode], tallies: dict[Mode, ModeTally]
) -> Iterator[PreferencePair]:
    for mode, mine, choice, pair in prompt_pairs(
        responses, {mode: run.index.source.truncation[mode] for mode in modes}, run.template, run.min_gap
    ):
        tallies[mode].count(mine, choice)
        if pair is not None:
            tallies[mode].count_pair(pair, exact_text=reads_back(pair, run.template.tokenizer))
            yield pair


def _with_ref_logps(run: _Run, policy: Policy, pairs: list[PreferencePair]) -> list[PreferencePair]:
    keys = [{"prompt_id": pair.prompt_id, "mode": pair.mode} for pair in pairs]
    rows = run.ref_logps.rows(keys, lambda: reference_logps(policy, pairs))
    return [
        replace(pair, ref_chosen_logps=row["ref_chosen_logps"], ref_rejected_logps=row["ref_rejected_logps"])
        for pair, row in zip(pairs, rows, strict=True)
    ]
