"""Options of the theorems study."""

from __future__ import annotations

from dataclasses import dataclass

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

    beta: float = 0.1
    draws: int = 16_384
    seed: int = 0
    embedded_prompts: int = 40

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"`beta={self.beta}`: must be positive.")
        if self.draws < 2_048:
            raise UserError(f"`draws={self.draws}`: at least 2048, or sampled checks say nothing at batch size 128.")
        if self.embedded_prompts < 0 or 0 < self.embedded_prompts < 10:
            raise UserError(f"`embedded_prompts={self.embedded_prompts}`: 0 for none, else at least 10.")
