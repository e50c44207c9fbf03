"""Diagnostics of the trace weights over all prompts: can mu be had from them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.marginal import SideDiagnostics

COLLAPSED_SIZE = 1.5
"""Effective size under which the traces of an answer count as one."""

COLLAPSED_SHARE = 0.5
"""Share of answers with collapsed weights beyond which mu is not estimable."""

ANCHOR_GAP_FACTOR = 2.0
"""An anchor gap beyond this multiple of log K is a red flag: about e^J draws would be needed to see the posterior."""


@dataclass(frozen=True)
class MarginalDiagnostics:
    """Trace weights over all pair sides.

    Attributes:
        sides: Pair sides.
        traces: Mean number of traces per side.
        effective_size: Mean effective size.
        median_effective_size: Median effective size.
        largest: Mean of the largest normalised weight.
        anchor_gap: Mean of the anchor gap J over the sides that have one (each rests on a single anchor; the mean is
            what to compare with log K); None without.
        log_traces: Log of the mean number of proposal draws.
        k_hat: Largest Pareto k-hat over the sides where it could be fitted; None without.
        k_threshold: Threshold for k-hat at the largest number of traces.
        certified: Share of sides whose own diagnostics certify them.
        collapsed_share: Share of sides with at least two traces whose effective size is below `COLLAPSED_SIZE`.
        collapsed: Whether mu is not estimable from these weights: most such sides are collapsed, or the anchor gap is
            far beyond log K (draws that all miss the posterior can have equal weights and a large effective size).
    """

    sides: int
    traces: float
    effective_size: float
    median_effective_size: float
    largest: float
    anchor_gap: float | None
    log_traces: float
    k_hat: float | None
    k_threshold: float
    certified: float
    collapsed_share: float
    collapsed: bool

    @property
    def failure(self) -> str | None:
        """Why mu is not estimable from these weights, in words; None where it is."""
        if not self.collapsed:
            return None
        if self.collapsed_share > COLLAPSED_SHARE or self.anchor_gap is None:
            return f"the weights of {self.collapsed_share:.0%} of the answers have collapsed"
        return f"the draws miss the posterior (anchor gap {self.anchor_gap:.2g} against log K = {self.log_traces:.2g})"


def aggregate(diagnostics: Sequence[SideDiagnostics]) -> MarginalDiagnostics:
    """Diagnostics of all pair sides in one.

    A side with one trace has nothing to collapse; if no side has more, the weights say nothing and ``collapsed`` is
    False.

    Raises:
        UserError: There are none.
    """
    if not diagnostics:
        raise UserError("There are no trace weights to diagnose; the method uses no trace bank.")
    weights = [side.weights for side in diagnostics]
    sizes = np.array([w.effective_size for w in weights])
    several = np.array([w.traces > 1 for w in weights])
    gaps = [w.anchor_gap for w in weights if w.anchor_gap is not None]
    k_hats = [w.k_hat for w in weights if w.k_hat is not None]
    collapsed_share = float((sizes[several] < COLLAPSED_SIZE).mean()) if several.any() else 0.0
    log_traces = float(np.log(np.mean(np.exp([w.log_traces for w in weights]))))
    gap = float(np.mean(gaps)) if gaps else None
    missed = gap is not None and gap > ANCHOR_GAP_FACTOR * max(log_traces, np.log(2))
    return MarginalDiagnostics(
        sides=len(weights),
        traces=float(np.mean([w.traces for w in weights])),
        effective_size=float(sizes.mean()),
        median_effective_size=float(np.median(sizes)),
        largest=float(np.mean([w.largest for w in weights])),
        anchor_gap=gap,
        log_traces=log_traces,
        k_hat=max(k_hats) if k_hats else None,
        k_threshold=max(w.k_threshold for w in weights),
        certified=float(np.mean([w.certified for w in weights])),
        collapsed_share=collapsed_share,
        collapsed=collapsed_share > COLLAPSED_SHARE or missed,
    )
