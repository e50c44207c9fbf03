"""Figure of the training runs on the embedded model: what each method changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bvpo_stats.studies.style import INK, PALETTE, figure


def embedded_training_figure(found: dict[str, Any], folder: Path) -> Path:
    """Accuracy of every method less that of the untrained model, in both modes; means over seeds, 95% intervals.

    Args:
        found: ``benchmarks/embedded_training.json``.
        folder: Where the PNG file goes.
    """
    path, rows = folder / "accuracy_change.png", found["rows"][1:]
    places = np.arange(len(rows))
    modes = ("Thinking, accuracy", "NoThinking, accuracy")
    with figure(path, width=7.2, height=3.8) as (fig, axes):
        for label, offset, colour, marker in zip(modes, (-0.1, 0.1), PALETTE, "os", strict=False):
            entries = [row["differences"][label] for row in rows]
            value, low, high = (
                100 * np.array([e[name] for e in entries], dtype=float) for name in ("value", "low", "high")
            )
            axes.errorbar(places + offset, value, (value - low, high - value), fmt=marker, ms=5, lw=1.4, color=colour,
                          label=label.partition(",")[0])  # fmt: skip
        axes.axhline(0, color=INK, lw=1, ls=":")
        axes.set_xticks(places, [row["method"].replace(", ", "\n") for row in rows])
        axes.set_xlim(-0.5, len(rows) - 0.5)
        axes.set_ylabel("Change of accuracy (points)")
        axes.set_title("Embedded model: after training, less before (95% over seeds)")
        fig.legend(loc="outside lower center", ncols=2)
    return path
