"""Settings of the variance study."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from bvpo_stats import options as o
from bvpo_stats.model.options import PolicyOptions
from bvpo_stats.sampling.engines.base import SamplingOptions

if TYPE_CHECKING:
    from bvpo_stats.studies.variance.report import Definitions


@dataclass(frozen=True)
class VarianceConfig:
    """Settings of a variance study.

    Attributes:
        policy: Which model.
        prompts: Source of the prompts.
        split: Split, where the prompts are a dataset.
        config_name: Configuration, where the dataset has several.
        samples: Responses per prompt and mode.
        temperature: Softmax temperature of the draw.
        top_p: Nucleus mass; 1 samples the whole distribution.
        max_new_tokens: Cut-off in tokens; None for 256 with the embedded model, else 4096.
        batch_size: Responses drawn at once, None for automatic.
        seed: Decides every draw.
        limit: Use only the first so many prompts.
        samples_from: Analyse these responses instead of drawing any.
        nll: How the tables pool log-probabilities, see `bvpo_stats.studies.variance.report.Definitions`.
        ddof: Variances divide by n - ddof.
        level: Confidence level of every interval.
    """

    policy: PolicyOptions = field(default_factory=PolicyOptions)
    prompts: o.Prompts = "embedded"
    split: o.PromptSplit = "train"
    config_name: o.ConfigName = None
    samples: o.Samples = 5
    temperature: o.Temperature = 0.8
    top_p: o.TopP = 1.0
    max_new_tokens: o.MaxNewTokens = None
    batch_size: o.BatchSize = None
    seed: o.Seed = 0
    limit: o.Limit = None
    samples_from: Annotated[
        Path | None, o.Option("Analyse the responses in this samples.jsonl instead of drawing new ones.")
    ] = None
    nll: Annotated[
        Literal["tokens", "questions"],
        o.Option("Per-token NLL: `tokens` pools over all tokens, `questions` averages per question."),
    ] = "tokens"
    ddof: Annotated[int, o.Option("Variances divide by n - ddof.", low=0, high=1, hint="be 0 or 1")] = 1
    level: o.Level = 0.95

    def __post_init__(self) -> None:
        o.check_options(self)

    @property
    def sampling(self) -> SamplingOptions:
        """How responses are drawn."""
        tokens = o.max_new_tokens(self.max_new_tokens, self.policy.model)
        return SamplingOptions(self.samples, self.temperature, self.top_p, tokens, self.seed)

    @property
    def definitions(self) -> Definitions:
        """How the tables are defined."""
        from bvpo_stats.studies.variance.report import Definitions

        return Definitions(self.nll, self.ddof, self.level)
