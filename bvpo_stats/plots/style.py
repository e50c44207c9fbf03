"""The visual language of all figures.

Colours are from the colour-blind-safe palette of Okabe and Ito as shipped with seaborn; intervals are always drawn;
axes carry units. Text and axes are mid-grey on a transparent ground, so that figures read on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed, and none is opened

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE = sns.color_palette("colorblind")
INK = "#7d7d7d"  # contrast of about 4:1 on white and on near-black
_STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 10,
    "legend.frameon": False,
    "svg.hashsalt": "bvpo-stats",
}


@contextmanager
def figure(path: Path, *, width: float = 6.4, height: float = 3.6) -> Iterator[tuple[Figure, Axes]]:
    """A figure in the house style, saved as PNG at the end."""
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(figsize=(width, height), layout="constrained")
        try:
            yield fig, axes
            path.parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(path, dpi=144, metadata={"Software": None})
        finally:
            plt.close(fig)
