"""Settings of a pairs run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from bvpo_stats import options as o
from bvpo_stats.model.options import PolicyOptions
from bvpo_stats.records import MODES, Mode


@dataclass(frozen=True)
class PairsConfig:
    """Settings of a pairs run.

    Attributes:
        samples: Folder of a sampling run.
        reward: What ranks the answers, see :func:`~bvpo_stats.sampling.rewards.load_reward`.
        policy: The sampling model: its tokenizer renders the prompts, its weights give reference log-probabilities.
        modes: Which of D_t (thinking) and D_e (nothinking).
        ref_logps: Store the reference log-probabilities of both sides of each pair.
        min_gap: Least difference of the rewards of a pair.
    """

    samples: Annotated[
        Path,
        o.Option(
            "Folder of a sampling run (the `output` of `bvpo-stats sample`).", shown="the last one beside `output`"
        ),
    ]
    reward: Annotated[
        str,
        o.Option(
            "Ranks the final answers: embedded (the arithmetic's grade), embedded-judge (its wording alone), "
            "math-verify, model:PATH, file:SCORES.jsonl or module:function.",
            shown="embedded for samples of the embedded model",
        ),
    ]
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

    def __post_init__(self) -> None:
        o.check_options(self)
