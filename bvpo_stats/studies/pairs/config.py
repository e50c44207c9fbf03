"""Settings of a pairs run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from bvpo_stats import options as o
from bvpo_stats.errors import UserError
from bvpo_stats.model.options import PolicyOptions
from bvpo_stats.records import MODES, Mode


@dataclass(frozen=True)
class PreferenceOptions:
    """Preference data of elsewhere, and the traces that are drawn for its answers.

    Attributes:
        source: File, folder or hub id, in a layout of :mod:`bvpo_stats.sampling.preferences`.
        split: Split of a dataset.
        config_name: Configuration of a dataset that has several.
        limit: Use only the first so many rows that give a pair.
        traces_per_answer: K, states of the chain that are kept for each answer; the first is the pair's own trace.
        mh_moves: Moves between two of them.
        burn_in: Moves before the first.
        max_new_tokens: Longest trace and answer in tokens; None for 256 with the embedded model, else 4096.
        batch_size: Traces drawn at once.
        seed: Decides every draw.
    """

    source: Annotated[
        str,
        o.Option(
            "Makes D_t and D_e of preference data instead of samples: file, folder or hub id, in the columns of TRL, "
            "UltraFeedback, HelpSteer, Skywork or open-r1. Traces are drawn for answers that have none.",
            name="from-preferences",
        ),
    ]
    split: Annotated[str, o.Option("Split of a dataset given as `source`.")] = "train"
    config_name: o.ConfigName = None
    limit: Annotated[int | None, o.Option("Use only the first so many pairs.", low=1, high=10**12)] = None
    traces_per_answer: Annotated[
        int, o.Option("K: posterior traces kept for each answer, and as many prior ones.", low=1, high=10**5)
    ] = 4
    mh_moves: Annotated[int, o.Option("Metropolis-Hastings moves between two that are kept.", low=1, high=10**5)] = 3
    burn_in: Annotated[int, o.Option("Moves before the first is kept.", low=0, high=10**6)] = 20
    max_new_tokens: Annotated[
        int | None,
        o.Option("Longest trace with its answer.", low=1, high=10**8, shown="256 embedded, else 4096"),
    ] = None
    batch_size: Annotated[int, o.Option("Traces drawn at once. Does not change the results.", low=1, high=10**6)] = 64
    seed: o.Seed = 0

    def __post_init__(self) -> None:
        o.check_options(self)


@dataclass(frozen=True)
class PairsConfig:
    """Settings of a pairs run: of samples and what ranks them, or of preference data.

    Attributes:
        samples: Folder of a sampling run.
        reward: What ranks the answers, see :func:`~bvpo_stats.sampling.rewards.load_reward`.
        policy: The sampling model: its tokenizer renders the prompts, its weights give reference log-probabilities.
        modes: Which of D_t (thinking) and D_e (nothinking).
        ref_logps: Store the reference log-probabilities of both sides of each pair.
        min_gap: Least difference of the rewards of a pair.
        preferences: Preference data in the place of samples and reward.
        push_to_hub: Repository on the hub that takes the pairs with their card.
    """

    samples: Annotated[
        Path | None,
        o.Option(
            "Folder of a sampling run (the `output` of `bvpo-stats sample`).", shown="the last one beside `output`"
        ),
    ] = None
    reward: Annotated[
        str | None,
        o.Option(
            "Ranks the final answers: embedded (the arithmetic's grade), embedded-judge (its wording alone), "
            "math-verify, model:PATH, file:SCORES.jsonl or module:function.",
            shown="embedded for samples of the embedded model",
        ),
    ] = None
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    modes: Annotated[
        tuple[Mode, ...],
        o.Option(
            "D_t (thinking), D_e (nothinking) or both.",
            name="mode",
            read=o.modes,
            spelled="both",
            metavar="<both|thinking|nothinking>",
        ),
    ] = MODES
    ref_logps: Annotated[bool, o.Option("Store the sampling model's log-probabilities of both responses.")] = False
    min_gap: Annotated[
        float, o.Option("Least difference of the rewards of a pair; 0 takes any but a tie.", low=0, high=1e12)
    ] = 0.0
    preferences: PreferenceOptions | None = None
    push_to_hub: o.PushToHub = None

    def __post_init__(self) -> None:
        o.check_options(self)
        if self.preferences is not None:
            if self.samples is not None or self.reward is not None:
                raise UserError("`source` brings answers and preferences; leave out `samples` and `reward`.")
        elif self.samples is None or self.reward is None:
            raise UserError("Pairs need `samples` and `reward`, or preference data (`source`).")
