"""Settings of the theorems study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from bvpo_stats import options as o
from bvpo_stats.errors import UserError


@dataclass(frozen=True)
class TheoremConfig:
    """Settings of the checks.

    Attributes:
        beta: DPO's beta.
        draws: Examples drawn where a claim is measured on samples.
        seed: Decides the oracles and every draw.
        embedded_prompts: Prompts of the embedded model behind Appendix B's check; 0 leaves the model out.
    """

    beta: Annotated[float, o.Option("Inverse temperature of the DPO loss.", above=0, high=1e3)] = 0.1
    draws: Annotated[
        int,
        o.Option(
            "Examples drawn where a claim is measured on samples.",
            low=2_048,
            high=10**8,
            hint="be 2048 to 10^8; with fewer, sampled checks say nothing at batch size 128",
        ),
    ] = 16_384
    seed: o.Seed = 0
    embedded_prompts: Annotated[
        int, o.Option("Questions put to the embedded model for Appendix B; 0 leaves it out.", low=0, high=10**6)
    ] = 40

    def __post_init__(self) -> None:
        o.check_options(self)
        if 0 < self.embedded_prompts < 10:
            raise UserError(f"`embedded_prompts={self.embedded_prompts}`: 0 for none, else at least 10.")
