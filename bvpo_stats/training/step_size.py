"""eta L at the current learning rate: given, or the learning rate times a measured smoothness."""

from __future__ import annotations

from dataclasses import dataclass

from bvpo_stats.errors import UserError


@dataclass(frozen=True)
class StepSize:
    """How ``eta L`` follows from the learning rate.

    Attributes:
        eta_l: ``eta L`` at the peak learning rate; it shrinks with the schedule.
        peak: Peak learning rate.
        smoothness: L where it was measured (the curvature along the gradient noise); then ``eta_l`` is not looked at.

    >>> StepSize(eta_l=1.0, peak=0.1).at(0.05), StepSize(peak=0.1, smoothness=30.0).at(0.1)
    (0.5, 3.0)
    """

    eta_l: float = 1.0
    peak: float = 1.0
    smoothness: float | None = None

    def __post_init__(self) -> None:
        if not (self.eta_l > 0 and self.peak > 0):
            raise UserError(f"eta_l {self.eta_l} and the peak learning rate {self.peak} must be positive.")

    def at(self, learning_rate: float) -> float:
        """``eta L`` at a learning rate; 0 at a learning rate of 0, where nothing moves."""
        if self.smoothness is not None:
            return learning_rate * max(self.smoothness, 0.0)
        return self.eta_l * learning_rate / self.peak
