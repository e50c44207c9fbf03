"""Settings of a traces run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from bvpo_stats import options as o
from bvpo_stats.model.options import PolicyOptions
from bvpo_stats.records import TraceSource

if TYPE_CHECKING:
    from bvpo_stats.sampling.traces import BankOptions

SOURCES: tuple[TraceSource, ...] = get_args(TraceSource)


def _sources(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(",") if word.strip())


@dataclass(frozen=True)
class TracesConfig:
    """Settings of a traces run; what goes into the bank is explained in `bvpo_stats.sampling.traces.BankOptions`.

    Attributes:
        pairs: Folder of a pairs run with D_t, or its ``thinking.jsonl``.
        samples: Folder of the sampling run that the pairs were made from.
        traces_per_answer: K.
        sources: Which kinds of traces.
        temperature: Of new draws.
        mh_moves: Moves of a chain for each trace that is kept.
        burn_in: Moves before the first is kept; None for 0 or 10 by the temperature of the anchors.
        prior: ``fresh`` or ``samples``.
        policy: The sampling model.
        batch_size: Sequences generated at once.
        seed: Decides every draw.
        limit: Use only the first so many pairs.
    """

    pairs: Annotated[
        Path,
        o.Option("Folder of a pairs run that holds D_t (thinking.jsonl).", shown="the last one beside `output`"),
    ]
    samples: Annotated[
        Path,
        o.Option(
            "Folder of the sampling run that the pairs were made from.",
            shown="the run beside `output` with its samples",
        ),
    ]
    traces_per_answer: Annotated[
        int,
        o.Option(
            "K: posterior traces per answer (anchor, same-answer, mh), and as many prior ones.", low=1, high=10**5
        ),
    ] = 8
    sources: Annotated[
        tuple[TraceSource, ...],
        o.Option(
            "Kinds of traces: a comma-separated choice of anchor, same-answer, mh, prior.",
            read=_sources,
            spelled=",".join(SOURCES),
        ),
    ] = SOURCES
    temperature: o.Temperature = 1.0
    mh_moves: Annotated[int, o.Option("Metropolis-Hastings moves for each trace that is kept.", low=1, high=10**5)] = 3
    burn_in: Annotated[
        int | None,
        o.Option(
            "Moves before the first is kept.",
            shown="0 for samples at temperature 1, else 10",
            low=0,
            high=10**6,
        ),
    ] = None
    prior: Annotated[
        Literal["fresh", "samples"],
        o.Option(
            "Prior traces: drawn anew, or the prompt's other samples (free, but biased by the selection).",
            metavar="<fresh|samples>",
        ),
    ] = "fresh"
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    batch_size: Annotated[int, o.Option("Traces drawn at once. Does not change the results.", low=1, high=10**6)] = 64
    seed: o.Seed = 0
    limit: Annotated[int | None, o.Option("Use only the first so many pairs.", low=1, high=10**12)] = None

    def __post_init__(self) -> None:
        o.check_options(self)
        _ = self.bank  # refuses unknown sources

    @property
    def bank(self) -> BankOptions:
        """What goes into the bank."""
        from bvpo_stats.sampling.traces import BankOptions

        return BankOptions(
            traces_per_answer=self.traces_per_answer,
            sources=self.sources,
            temperature=self.temperature,
            mh_moves=self.mh_moves,
            burn_in=self.burn_in,
            prior=self.prior,
        )
